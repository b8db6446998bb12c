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

ROWS = 128  # of a program of the kernel

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


def _takes_kernel(z):
    return triton is not None and (z.is_cuda or INTERPRETED) and z.dtype != torch.float64


@torch.library.custom_op("gpt2::gelu_gradient", mutates_args=("d",))
def gelu_gradient(z: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of z (N, C) and d, dL/dGELU(z), which becomes dL/dz: GELU(z), and the sums of dL/dz over blocks of rows.

    These are (blocks, C) float32 or wider; to add them up, for the gradient of a bias, is left to the compiler.
    """
    if not _takes_kernel(z):
        d.copy_(torch.ops.aten.gelu_backward(d, z, approximate="tanh"))
        return F.gelu(z, approximate="tanh"), d.sum(0, keepdim=True, dtype=torch.promote_types(d.dtype, torch.float32))
    (N, C), COLUMNS = z.shape, 512
    a, sums = _like_gelu_gradient(z, d)
    _gelu_gradient[(len(sums), triton.cdiv(C, COLUMNS))](z, d, a, sums, N, C, ROWS=ROWS, A=4, COLUMNS=COLUMNS)
    return a, sums


@gelu_gradient.register_fake
def _like_gelu_gradient(z, d):
    blocks = -(-len(z) // ROWS) if _takes_kernel(z) else 1
    return z.new_empty(z.shape), z.new_empty(blocks, z.shape[1], dtype=torch.promote_types(z.dtype, torch.float32))


class _MLP(torch.autograd.Function):
    """Only the kernel is an operator of its own: the compiler sees, and calls, the matrix products."""

    @staticmethod
    def forward(ctx, x, weight, bias, out_weight):
        z = torch.addmm(bias.to(x.dtype), x, weight.T)
        ctx.save_for_backward(x, z, weight, out_weight)
        ctx.bias_dtype = bias.dtype
        return F.gelu(z, approximate="tanh") @ out_weight.T

    @staticmethod
    def backward(ctx, dy):
        x, z, weight, out_weight = ctx.saved_tensors
        dz = dy @ out_weight
        a, sums = gelu_gradient(z, dz)
        return dz @ weight, dz.T @ x, sums.sum(0).to(ctx.bias_dtype), dy.T @ a


def mlp(x, weight, bias, out_weight):
    """GELU(x weight^T + bias) out_weight^T, (N, C).

    GELU by tanh: Hendrycks and Gimpel, arXiv 1606.08415, section 2.
    x (N, C), weight (W, C) and out_weight (C, W) of one dtype, that of autocast where it is on; bias (W) of that or a
    wider one.
    """
    return _MLP.apply(x, weight, bias, out_weight)
