"""The projection to queries, keys and values against float64: python -m pytest tests/test_qkv.py (-m gpu with CUDA)."""

import pytest
import torch
import torch.nn.functional as F

from adasplash_kernels import causal_entmax_attention, causal_entmax_attention_qkvpacked
from qkv import queries_keys_values, queries_keys_values_packed


def errors(B, T, H, D, dtype, packed, device="cpu"):
    """Relative errors of q, k and v and of the gradients by x, weight and bias."""
    generator = torch.Generator(device).manual_seed(B + T)

    def drawn(*shape, dtype=dtype):
        return torch.randn(*shape, device=device, generator=generator).to(dtype).requires_grad_()

    C, bias_dtype = H * D, torch.float64 if dtype == torch.float64 else torch.float32
    tensors = drawn(B, T, C), drawn(3 * C, C), drawn(C, dtype=bias_dtype)
    # as some kernels give them, and others
    gradients = [drawn(B, T, H, D).detach().transpose(1, 2), drawn(B, H, T, D).detach(), drawn(B, H, T, D).detach()]
    if packed:
        out = [queries_keys_values_packed(*tensors, H)]
        gradients = [torch.stack(gradients).permute(1, 3, 0, 2, 4)]
    else:
        out = queries_keys_values(*tensors, H)
    got = *out, *torch.autograd.grad(out, tensors, gradients)
    assert [x.dtype for x in got] == [dtype] * len(out) + [x.dtype for x in tensors]
    x, weight, bias = exact = [x.detach().double().requires_grad_() for x in tensors]
    qkv = (x @ weight.T + F.pad(bias, (0, 2 * C))).view(B, T, 3, H, D)
    out = [qkv] if packed else qkv.permute(2, 0, 3, 1, 4).unbind(0)
    expected = *out, *torch.autograd.grad(out, exact, [x.double() for x in gradients])
    return [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]


SHAPES = (1, 1, 1, 8), (3, 43, 2, 6), (2, 150, 3, 100)


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, packed):
    assert max(errors(*shape, torch.float32, packed)) < 2e-6
    assert max(errors(*shape, torch.bfloat16, packed)) < 0.005  # up to three roundings to 8 bits
    assert max(errors(*shape, torch.float64, packed)) < 1e-14


@pytest.mark.parametrize("alpha", (1, 1.5))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_other_biases_do_as_they_are_left_out(shape, alpha):
    """That of the keys changes nothing, that of the values joins the output."""
    B, T, H, D = shape
    generator = torch.Generator().manual_seed(T)
    shapes = (B, T, H * D), (3 * H * D, H * D), (3 * H * D,)
    x, weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    q_bias, _, v_bias = bias.chunk(3)
    expected = causal_entmax_attention_qkvpacked(F.linear(x, weight, bias).view(B, T, 3, H, D), alpha)
    v_bias = v_bias.view(H, 1, D)
    got = causal_entmax_attention(*queries_keys_values(x, weight, q_bias, H), alpha) + v_bias
    torch.testing.assert_close(got, expected)
    got = causal_entmax_attention_qkvpacked(queries_keys_values_packed(x, weight, q_bias, H), alpha) + v_bias
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("project", (queries_keys_values, queries_keys_values_packed))
def test_the_bias_is_summed_up_in_its_own_precision(project):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 600, 12), (36, 12), (12,)))
    inputs = x.bfloat16(), weight.bfloat16(), bias.requires_grad_()
    out = project(*inputs, 3)
    loss = sum(z.float().square().sum() for z in (out if isinstance(out, tuple) else [out]))
    (dbias,) = torch.autograd.grad(loss, inputs[2])
    rows = 2 * F.linear(inputs[0], inputs[1][:12], bias.detach().bfloat16()).double().flatten(0, 1)
    assert dbias.dtype == torch.float32
    assert ((dbias - rows.sum(0)) / rows.abs().sum(0)).abs().max() < 1e-6


def test_gradients_of_some():
    """A loss may depend on the values alone, and not all need a gradient."""
    x, weight, bias = torch.randn(2, 5, 12), torch.randn(36, 12, requires_grad=True), torch.randn(12)
    _, _, v = queries_keys_values(x, weight, bias, 3)
    (got,) = torch.autograd.grad(v.square().sum(), weight)
    expected = torch.zeros(36, 12)
    v = v.detach().transpose(1, 2).reshape(10, 12)
    expected[24:] = 2 * v.T @ x.flatten(0, 1)
    torch.testing.assert_close(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", (False, True))
def test_gpu_against_float64(packed):
    torch.set_float32_matmul_precision("highest")
    for shape in (*SHAPES, (5, 1000, 12, 64)):
        assert max(errors(*shape, torch.float32, packed, "cuda")) < 1e-5
        assert max(errors(*shape, torch.bfloat16, packed, "cuda")) < 0.005
