"""The loss of the head against float64: python -m pytest tests/test_cross_entropy.py (add -m gpu on a CUDA machine)."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import run_in_interpreter

import cross_entropy
from cross_entropy import head_loss
from model import GPT, GPTConfig

INTERPRETED = "TRITON_INTERPRET" in os.environ  # CPU tensors go to the kernel


def drawn(N, V, vocab_size, C, dtype, device="cpu", size=1.0):
    """x, weight, targets of a head."""
    generator = torch.Generator(device).manual_seed(N + V)
    x = torch.randn(N, C, device=device, generator=generator).to(dtype)
    weight = size * C**-0.5 * torch.randn(V, C, device=device, generator=generator)
    return x, weight, torch.randint(vocab_size, (N,), device=device, generator=generator)


def results(loss, x, weight):
    return loss.detach(), *torch.autograd.grad(3 * loss, (x, weight))


def errors(x, weight, targets, vocab_size):
    """Relative errors of the loss and of both gradients, and the gradient of the rows that are no tokens."""
    x, weight = x.requires_grad_(), weight.requires_grad_()
    got = results(head_loss(x, weight, targets, vocab_size)[0], x, weight)
    assert [y.dtype for y in got] == [torch.float32, x.dtype, torch.float32]
    exact_x, exact_weight = (y.detach().double().requires_grad_() for y in (x, weight))
    logits = exact_x @ exact_weight.to(x.dtype).double().T
    expected = results(F.cross_entropy(logits[:, :vocab_size], targets), exact_x, exact_weight)
    return [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)], got[2][vocab_size:]


@pytest.mark.parametrize("size", (1.0, 100.0))
@pytest.mark.parametrize("N, V, vocab_size", ((1, 16, 16), (63, 384, 257), (5, 4096, 4096), (200, 8320, 8200)))
def test_loss_and_gradients(monkeypatch, N, V, vocab_size, size):
    monkeypatch.setattr(cross_entropy, "ROWS", 64)
    found, no_tokens = errors(*drawn(N, V, vocab_size, 24, torch.float32, size=size), vocab_size)
    assert max(found) < (2e-6 if size == 1 else 2e-5)  # e to the power of a logit multiplies its rounding
    assert not no_tokens.any()


def test_loss_and_gradients_in_bfloat16(monkeypatch):
    monkeypatch.setattr(cross_entropy, "ROWS", 64)
    found, no_tokens = errors(*drawn(200, 384, 257, 24, torch.bfloat16), 257)
    assert max(found) < 0.01  # two roundings to 8 bits
    assert not no_tokens.any()


@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_what_is_not_finite_stays_so(bad):
    x, weight, targets = drawn(5, 16, 13, 8, torch.float32)
    x[2, 3] = bad
    x.requires_grad_()
    loss = head_loss(x, weight, targets, 13)[0]
    assert not loss.isfinite()
    assert not torch.autograd.grad(loss, x)[0][2].isfinite().all()


def test_targets_that_lie_apart():
    x, weight, targets = drawn(20, 16, 13, 8, torch.float32)
    apart = torch.stack([torch.zeros_like(targets), targets], 1)[:, 1]
    for one, other in zip(head_loss(x, weight, apart, 13), head_loss(x, weight, targets, 13), strict=True):
        assert torch.equal(one, other)


def test_opcheck():
    x, weight, targets = drawn(20, 16, 13, 8, torch.float32)
    torch.library.opcheck(head_loss, (x.requires_grad_(), weight.requires_grad_(), targets, 13))


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter run")
def test_the_kernel_in_the_interpreter():
    run_in_interpreter(__file__, "gradients or finite or apart")


@pytest.mark.skipif(INTERPRETED, reason="models are for PyTorch here")
@pytest.mark.parametrize("attention", ("softmax", "entmax"))
def test_gradients_of_a_step_in_bfloat16(attention):
    """They differ from float32's by the noise of 8 bits: over all weights, and more where a gradient is small."""
    model = GPT(GPTConfig(2, 4, 64, 128, 257, attention))
    model.init_weights(torch.Generator().manual_seed(0))
    tokens = torch.randint(257, (4, 129), generator=torch.Generator().manual_seed(1))
    gradients = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = model(tokens[:, :-1], tokens[:, 1:], reduction="mean")
        assert loss.item() == pytest.approx(model(tokens[:, :-1], tokens[:, 1:]).mean().item(), rel=1e-4)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for (name, _), rough, exact in zip(model.named_parameters(), *gradients, strict=True):
        assert (rough - exact).norm() <= 0.1 * exact.norm(), name
    rough, exact = (torch.cat([gradient.flatten() for gradient in kind]) for kind in gradients)
    assert (rough - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype, bound", ((torch.float32, 1e-5), (torch.bfloat16, 0.01)))
def test_gpu_loss_and_gradients(dtype, bound):
    torch.set_float32_matmul_precision("highest")
    found, no_tokens = errors(*drawn(9001, 50304, 50257, 64, dtype, "cuda", 4.0), 50257)
    assert max(found) < bound
    assert not no_tokens.any()
