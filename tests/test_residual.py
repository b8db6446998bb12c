"""The residual stream's norms and sums against float64: python -m pytest tests/test_residual.py (-m gpu with CUDA)."""

import os
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import run_in_interpreter
from torch._inductor.utils import run_and_get_code

import residual
from residual import add_product, add_product_, norm, normed, normed_gradient

INTERPRETED = "TRITON_INTERPRET" in os.environ  # CPU tensors go to the kernels


def relative(got, expected):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]


def errors(N, C, dtype, device="cpu", mean=0.0, size=1.0):
    """Relative errors of the norm, and of the gradients by x and bias. The elements of all tensors lie apart."""
    generator = torch.Generator(device).manual_seed(N + C)

    def drawn(*shape, dtype=dtype):
        return torch.randn(*shape, 2, device=device, generator=generator).to(dtype)[..., 0]

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, bias = (size * drawn(N, C) + mean).requires_grad_(), (size * drawn(C, dtype=wide)).requires_grad_()
    dx, dh = drawn(N, C), drawn(N, C)
    same, h = norm(x, bias, 1e-5)
    got = h, *torch.autograd.grad((same, h), (x, bias), (dx, dh))
    assert torch.equal(same, x) and [t.dtype for t in got] == [dtype, dtype, wide]
    x, bias = exact = [t.detach().double().requires_grad_() for t in (x, bias)]
    h, scale = F.layer_norm(x + bias, (C,)), (x + bias).var(1, correction=0, keepdim=True).add(1e-5).rsqrt().detach()
    g = dh.double()

    def gradients(h):
        own = scale * (g - g.mean(1, keepdim=True) - h * (g * h).mean(1, keepdim=True))
        return dx + own, own.sum(0)

    # the gradient is by the norm as it was rounded; this formula, by the norm as it is, is autograd's
    torch.testing.assert_close(gradients(h.detach()), torch.autograd.grad((x, h), exact, (dx.double(), g)))
    return relative(got, (h, *gradients(got[0].detach().double())))


SHAPES = (1, 8), (3, 129), (23, 24), (2, 1600)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So that each takes several rows, though the tests have few."""
    monkeypatch.setattr(residual, "PROGRAMS", 5)


SIZES = [(shape, 1.0, 0.0) for shape in SHAPES]
SIZES += [((3, 129), size, mean) for size, mean in ((1e-2, 0.0), (1e4, 0.0), (1.0, 30.0))]


@pytest.mark.parametrize("shape, size, mean", SIZES)
def test_norm_against_float64(shape, size, mean):
    assert max(errors(*shape, torch.float32, size=size, mean=mean)) < 1e-5
    assert max(errors(*shape, torch.bfloat16, size=size, mean=mean)) < 0.005  # one rounding to 8 bits
    assert max(errors(*shape, torch.float64, size=size, mean=mean)) < 1e-13


@pytest.mark.parametrize("dtype, bound", ((torch.float32, 1e-6), (torch.bfloat16, 0.005), (torch.float64, 1e-14)))
def test_product_against_float64(dtype, bound):
    x, a, weight = tensors = [torch.randn(*shape).to(dtype).requires_grad_() for shape in ((7, 12), (7, 20), (12, 20))]
    kept, dx = x.detach().clone(), torch.randn(7, 12).to(dtype)
    out = add_product(*tensors)
    got = out, *torch.autograd.grad(out, tensors, dx)
    assert torch.equal(x, kept) and [t.dtype for t in got] == [dtype] * 4
    x, a, weight = exact = [t.detach().double().requires_grad_() for t in tensors]
    out = x + a @ weight.T
    assert max(relative(got, (out, *torch.autograd.grad(out, exact, dx.double())))) < bound


def test_what_is_not_finite_stays_in_its_row():
    x = torch.randn(10, 12)
    x[7, 3] = float("nan")
    _, h = norm(x, torch.randn(12), 1e-5)
    assert h.isfinite().all(1).tolist() == [row != 7 for row in range(10)]


def test_one_column_is_its_mean():
    _, h = norm(torch.randn(7, 1), torch.randn(1), 1e-5)
    assert torch.equal(h, torch.zeros(7, 1))


def test_compiled_the_products_add_to_one_buffer():
    """Without a copy of it; and what norms between them have read is what it was then."""

    def stream(x, bias, weights):
        x = 2 * x
        for weight in weights:
            x, h = norm(x, bias, 1e-5)
            x = add_product(x, h, weight)
        return x.square().sum()

    x, bias = torch.randn(6, 8), torch.randn(8, requires_grad=True)
    weights = [torch.randn(8, 8, requires_grad=True) for _ in range(3)]
    got, (code, *_) = run_and_get_code(torch.compile(stream, fullgraph=True), x, bias, weights)
    expected = stream(x, bias, weights)
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(loss, [bias, *weights]) for loss in (got, expected)]
    torch.testing.assert_close(*gradients)
    buffers = re.findall(r"gpt2\.add_product_\.default\((\w+)", code)
    assert len(buffers) == 3 and len(set(buffers)) == 1


def test_opcheck():
    x, bias, scale = torch.randn(3, 5, 12), torch.randn(12), torch.rand(5)
    torch.library.opcheck(normed, (x[0], bias, 1e-5))
    torch.library.opcheck(normed, (torch.randn(12, 5).T, bias, 1e-5))
    torch.library.opcheck(normed_gradient, (x[0], scale, x[1], x[2]))
    torch.library.opcheck(add_product_, (x[0], x[1, :, :7], torch.randn(12, 7).T))


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter run")
def test_the_kernels_in_the_interpreter():
    run_in_interpreter(__file__, "norm_against or finite or column")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_against_float64(monkeypatch):
    monkeypatch.undo()
    for shape in (*SHAPES, (40_000, 768)):
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.005), (torch.float16, 0.001)):
            assert max(errors(*shape, dtype, "cuda")) < bound
            assert max(errors(*shape, dtype, "cuda", mean=30.0)) < bound
