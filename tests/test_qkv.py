"""The projection to queries, keys and values against float64: python -m pytest tests/test_qkv.py (-m gpu with CUDA)."""

import os

import pytest
import torch
import torch.nn.functional as F
from conftest import run_in_interpreter

from adasplash_kernels import causal_entmax_attention_qkvpacked
from qkv import pack, queries_keys_values, queries_keys_values_packed

INTERPRETED = "TRITON_INTERPRET" in os.environ  # CPU tensors go to the kernel


def errors(B, T, H, D, dtype, device="cpu"):
    """Relative errors of q, k and v and of the gradients by x, weight and bias."""
    generator = torch.Generator(device).manual_seed(B + T)

    def drawn(*shape, dtype=dtype):
        return torch.randn(*shape, device=device, generator=generator).to(dtype).requires_grad_()

    C, bias_dtype = H * D, torch.float64 if dtype == torch.float64 else torch.float32
    tensors = drawn(B, T, C), drawn(3 * C, C), drawn(3 * C, dtype=bias_dtype)
    gradients = [drawn(B, T, H, D).detach().transpose(1, 2), drawn(B, H, T, D).detach(), drawn(B, H, T, D).detach()]
    out = queries_keys_values(*tensors, H)
    got = *out, *torch.autograd.grad(out, tensors, gradients)
    assert [x.dtype for x in got] == [dtype] * 3 + [x.dtype for x in tensors]
    x, weight, bias = exact = [x.detach().double().requires_grad_() for x in tensors]
    out = (x @ weight.T + bias).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    expected = *out, *torch.autograd.grad(out, exact, [x.double() for x in gradients])
    return [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]


SHAPES = (1, 1, 1, 8), (3, 43, 2, 6), (2, 150, 3, 100)  # a program takes 128 rows and columns


@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape):
    assert max(errors(*shape, torch.float32)) < 2e-6
    assert max(errors(*shape, torch.bfloat16)) < 0.005  # one rounding to 8 bits
    assert max(errors(*shape, torch.float64)) < 1e-14


@pytest.mark.parametrize("alpha", (1, 1.5))
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_with_attention(shape, alpha):
    """Attention in float64 gives the same gradients as with a plain projection, and the keys' bias an exact zero."""
    B, T, H, D = shape
    generator = torch.Generator().manual_seed(T)
    shapes = (B, T, H * D), (3 * H * D, H * D), (3 * H * D,)
    tensors = [torch.randn(*x, generator=generator, dtype=torch.float64).requires_grad_() for x in shapes]
    dout = torch.randn(B, H, T, D, generator=generator, dtype=torch.float64)

    def gradients(qkv):
        return torch.autograd.grad(causal_entmax_attention_qkvpacked(qkv, alpha), tensors, dout)

    got = gradients(queries_keys_values_packed(*tensors, H))
    expected = gradients(F.linear(*tensors).view(B, T, 3, H, D))
    torch.testing.assert_close(got, expected)
    assert not got[2].view(3, -1)[1].any()


def test_packed_in_16_bits():
    """The bias's gradient is summed up in, and has, the bias's wider dtype."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 600, 12), (36, 12), (36,)))
    inputs = x.bfloat16(), weight.bfloat16(), bias.requires_grad_()
    (dbias,) = torch.autograd.grad(queries_keys_values_packed(*inputs, 3).float().square().sum(), inputs[2])
    rows = 2 * F.linear(*inputs[:2], bias.detach().bfloat16()).double().flatten(0, 1)
    assert dbias.dtype == torch.float32
    off = (dbias - rows.sum(0)) / rows.abs().sum(0)
    assert off.view(3, -1)[::2].abs().max() < 1e-6


def test_gradients_of_some():
    """A loss may depend on the values alone, and not all need a gradient."""
    x, weight, bias = torch.randn(2, 5, 12), torch.randn(36, 12, requires_grad=True), torch.randn(36)
    _, _, v = queries_keys_values(x, weight, bias, 3)
    (got,) = torch.autograd.grad(v.square().sum(), weight)
    expected = torch.zeros(36, 12)
    v = v.detach().transpose(1, 2).reshape(10, 12)
    expected[24:] = 2 * v.T @ x.flatten(0, 1)
    torch.testing.assert_close(got, expected)


def test_opcheck():
    torch.library.opcheck(pack, [torch.randn(2, 3, 5, 4) for _ in range(3)])


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter run")
def test_the_kernel_in_the_interpreter():
    run_in_interpreter(__file__, "float64")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_against_float64():
    torch.set_float32_matmul_precision("highest")
    for shape in (*SHAPES, (5, 1000, 12, 64)):
        assert max(errors(*shape, torch.float32, "cuda")) < 1e-5
        assert max(errors(*shape, torch.bfloat16, "cuda")) < 0.005
