"""A transformer's two layers with GELU between, of whose two wide tensors only one is kept for the backward pass.

That is GELU's argument. Its value, as large, is computed again by the kernel that also takes the gradient through GELU
and sums it up for the bias: the wide tensors are read and written once.
"""

import os

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = None  # not on this platform


if triton is not None:
    INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs on CPU tensors, in Python

    @triton.jit
    def _gelu_gradient(p_z, p_d, p_a, p_sums, N, C, ROWS: tl.constexpr, A: tl.constexpr, COLUMNS: tl.constexpr):
        """For ROWS rows and COLUMNS columns: a = GELU(z); dL/dz in the place of d = dL/da; its sums over the rows."""
        i_rows, o_c = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        first = i_rows.to(tl.int64) * ROWS * C
        b_sum = tl.zeros([A, COLUMNS], tl.float32)
        for start in range(0, ROWS, A):
            o_n = start + tl.arange(0, A)
            o = o_n[:, None] * C + o_c[None, :]
            mask = (o_n < N - i_rows * ROWS)[:, None] & (o_c < C)[None, :]
            b_z = tl.load(p_z + first + o, mask=mask, other=0.0).to(tl.float32)
            b_d = tl.load(p_d + first + o, mask=mask, other=0.0).to(tl.float32)
            # GELU by tanh is z s, s = 1 / (1 + exp(-y)) and y = sqrt(8 / pi) (z + 0.044715 z^3): here to base 2
            b_s = 1 / (1 + tl.exp2(b_z * (-2.302208198 - 0.1029432397 * b_z * b_z)))
            b_a = b_z * b_s
            b_d *= b_s + (b_a - b_a * b_s) * (1.5957691216 + 0.2140644489 * b_z * b_z)  # s + z s (1 - s) y'
            tl.store(p_a + first + o, b_a.to(p_a.dtype.element_ty), mask=mask)
            tl.store(p_d + first + o, b_d.to(p_d.dtype.element_ty), mask=mask)
            b_sum += b_d
        tl.store(p_sums + i_rows * C + o_c, tl.sum(b_sum, 0), mask=o_c < C)


def _to_gradient(z, d):
    """GELU(z), (N, C), and the bias's gradient, (C) float32 or wider; d, by GELU(z), becomes the gradient by z."""
    if triton is None or not (z.is_cuda or INTERPRETED) or z.dtype == torch.float64:
        d.copy_(torch.ops.aten.gelu_backward(d, z, approximate="tanh"))
        return F.gelu(z, approximate="tanh"), d.sum(0, dtype=torch.promote_types(d.dtype, torch.float32))
    (N, C), ROWS, COLUMNS = z.shape, 128, 512
    a, blocks = torch.empty_like(z), triton.cdiv(N, ROWS)
    sums = torch.empty(blocks, C, dtype=torch.float32, device=z.device)
    _gelu_gradient[(blocks, triton.cdiv(C, COLUMNS))](z, d, a, sums, N, C, ROWS=ROWS, A=4, COLUMNS=COLUMNS)
    return a, sums.sum(0)


@torch.library.custom_op("gpt2::mlp", mutates_args=())
def mlp(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """GELU(x weight^T + bias) out_weight^T, (N, C), and GELU's argument, (N, W), for the backward pass.

    GELU by tanh: Hendrycks and Gimpel, arXiv 1606.08415, section 2.
    x (N, C), weight (W, C) and out_weight (C, W) of one dtype, that of autocast where it is on; bias (W) of that or a
    wider one.
    """
    z = torch.addmm(bias.to(x.dtype), x, weight.T)
    return F.gelu(z, approximate="tanh") @ out_weight.T, z


@torch.library.custom_op("gpt2::mlp_backward", mutates_args=())
def mlp_backward(
    dy: torch.Tensor, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, out_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of mlp() with respect to x, weight, bias (float32 or wider) and out_weight."""
    dz = dy @ out_weight
    a, dbias = _to_gradient(z, dz)
    return dz @ weight, dz.T @ x, dbias, dy.T @ a


@mlp.register_fake
def _(x, weight, bias, out_weight):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], weight.shape[0])


@mlp_backward.register_fake
def _(dy, x, z, weight, out_weight):
    dbias = x.new_empty(weight.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), x.new_empty(weight.shape), dbias, x.new_empty(out_weight.shape)


def _setup_context(ctx, inputs, output):
    x, weight, _, out_weight = inputs
    ctx.save_for_backward(x, output[1], weight, out_weight)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for that, either


def _backward(ctx, dy, _):
    return mlp_backward(dy.contiguous(), *ctx.saved_tensors)


mlp.register_autograd(_backward, setup_context=_setup_context)
