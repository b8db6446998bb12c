"""Residual sums with their norms against float64: python -m pytest tests/test_add_norm.py (-m gpu with CUDA)."""

import os

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import run_in_interpreter

import add_norm as module
from add_norm import _AddNorm, add_norm, add_norm_gradient, add_norm_rows

INTERPRETED = "TRITON_INTERPRET" in os.environ  # CPU tensors go to the kernels


def errors(N, C, dtype, device="cpu", mean=0.0, size=1.0):
    """Relative errors of the sum, its norm, the gradients by x, y, y_bias, weight and bias, and the norm again.

    The elements of all tensors lie apart.
    """
    generator = torch.Generator(device).manual_seed(N + C)

    def drawn(*shape, dtype=dtype):
        return torch.randn(*shape, 2, device=device, generator=generator).to(dtype)[..., 0]

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, y = size * drawn(N, C) + mean, size * drawn(N, C)
    tensors = [t.requires_grad_() for t in (x, y, drawn(C, dtype=wide), drawn(C, dtype=wide), drawn(C, dtype=wide))]
    dx, dh = drawn(N, C), drawn(N, C)
    out = _AddNorm.apply(*tensors, 1e-5)
    got = *out, *torch.autograd.grad(out, tensors, (dx, dh))
    assert [t.dtype for t in got] == [dtype] * 2 + [t.dtype for t in tensors]
    got += (add_norm_gradient(out[0].detach(), *(t.detach() for t in tensors[3:]), dx, dh, 1e-5, True)[1],)
    x, y, y_bias, weight, bias = exact = [t.detach().double().requires_grad_() for t in tensors]
    total = x + y + y_bias
    # the norm is of the sum as it was rounded
    h = F.layer_norm(total + (out[0].double() - total).detach(), weight.shape, weight, bias)
    expected = total, h, *torch.autograd.grad((total, h), exact, (dx.double(), dh.double())), h
    return [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]


SHAPES = (1, 8), (3, 129), (23, 24), (2, 1600)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So that each takes several rows, though the tests have few."""
    monkeypatch.setattr(module, "PROGRAMS", 5)


SIZES = [(shape, 1.0, 0.0) for shape in SHAPES]
SIZES += [((3, 129), size, mean) for size, mean in ((1e-4, 0.0), (1e4, 0.0), (1.0, 30.0))]  # of what is summed


@pytest.mark.parametrize("shape, size, mean", SIZES)
def test_against_float64(shape, size, mean):
    assert max(errors(*shape, torch.float32, size=size, mean=mean)) < 1e-5
    assert max(errors(*shape, torch.bfloat16, size=size, mean=mean)) < 0.005  # one rounding to 8 bits
    assert max(errors(*shape, torch.float64, size=size, mean=mean)) < 1e-13


def test_of_a_module():
    """Any number of dimensions, and what is not finite stays so in its rows alone."""
    norm, y_bias = nn.LayerNorm(12), torch.randn(12)
    x, y = torch.randn(2, 2, 5, 12)
    x[1, 2, 3] = float("nan")
    total, h = add_norm(x, y, y_bias, norm)
    torch.testing.assert_close(total, x + y + y_bias, equal_nan=True)
    torch.testing.assert_close(h, norm(x + y + y_bias), equal_nan=True)
    assert h.isfinite().all(2).sum() == 9


def test_one_column_is_its_mean():
    norm = nn.LayerNorm(1)
    nn.init.constant_(norm.bias, 3)
    _, h = add_norm(torch.randn(7, 1), torch.randn(7, 1), torch.randn(1), norm)
    torch.testing.assert_close(h, torch.full((7, 1), 3.0))


def test_the_sum_stays_in_16_bits():
    x, y = torch.randn(2, 3, 12).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = add_norm(x, y, torch.randn(12), nn.LayerNorm(12))
    assert total.dtype == torch.bfloat16


def test_opcheck():
    rows, weights = torch.randn(3, 5, 12), torch.randn(3, 12)
    torch.library.opcheck(add_norm_rows, (*rows[:2], *weights, 1e-5))
    torch.library.opcheck(add_norm_rows, (*torch.randn(2, 12, 5).mT, *weights, 1e-5))
    for again in (False, True):
        torch.library.opcheck(add_norm_gradient, (rows[0], *weights[:2], *rows[1:], 1e-5, again))


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter run")
def test_the_kernels_in_the_interpreter():
    run_in_interpreter(__file__, "float64 or module or column or stays")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_against_float64(monkeypatch):
    monkeypatch.undo()
    for shape in (*SHAPES, (40_000, 768)):
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.005), (torch.float16, 0.001)):
            assert max(errors(*shape, dtype, "cuda")) < bound
            assert max(errors(*shape, dtype, "cuda", mean=30.0)) < bound
