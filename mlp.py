"""A transformer's two layers with GELU between; for the backward pass little is kept.

That is what the first layer gets, and GELU's argument, z. GELU(z), as large, is computed again by the kernel that also
takes the gradient through GELU and sums it up for the bias. On Hopper GELU and its gradient are done before the matrix
products that they follow are stored (mlp_hopper.py): the wide tensors are written once, and z is read once.
"""

import torch
import torch.nn.functional as F

from residual import add_product_, takes_kernel, triton

ROWS = 128  # of which a kernel gives one sum

if triton is not None:
    import triton.language as tl

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


def _takes_products(x, weight):
    """Whether a kernel ends the matrix products: on Hopper, in 16 bits, if rows are multiples of 16 bytes."""
    on_hopper = triton is not None and x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)
    fits = len(x) > 0 and x.element_size() == 2 and weight.shape[0] % 8 == weight.shape[1] % 8 == 0
    return on_hopper and fits


@torch.library.custom_op("gpt2::linear_gelu", mutates_args=())
def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """z = x weight^T + bias, and GELU(z), (N, W) in x's dtype; x (N, C), weight (W, C), bias (W)."""
    if _takes_products(x, weight):
        import mlp_hopper  # here, as others' Triton may lack Gluon

        z, a = _like_linear_gelu(x, weight, bias)
        mlp_hopper.linear_gelu(x.contiguous(), weight.contiguous(), bias.contiguous(), z, a)
        return z, a
    z = torch.addmm(bias.to(x.dtype), x, weight.T)
    return z, F.gelu(z, approximate="tanh")


@linear_gelu.register_fake
def _like_linear_gelu(x, weight, bias):
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(weight))


@torch.library.custom_op("gpt2::linear_gelu_gradient", mutates_args=())
def linear_gelu_gradient(
    dy: torch.Tensor, weight: torch.Tensor, z: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GELU(z); dL/dz for dL/dGELU(z) = dy weight; and the sums of dL/dz over blocks of rows.

    dy (N, C), weight (C, W); z, GELU(z) and dL/dz (N, W), z contiguous. The sums are (blocks, W) float32 or wider; to
    add them up, for the gradient of a bias, is left to the compiler.
    """
    if _takes_products(dy, weight):
        import mlp_hopper

        a, dz, sums = _like_linear_gelu_gradient(dy, weight, z)
        mlp_hopper.linear_gelu_gradient(dy.contiguous(), weight.contiguous(), z, a, dz, sums)
        return a, dz, sums
    dz = dy @ weight
    if not takes_kernel(z):
        dz = torch.ops.aten.gelu_backward(dz, z, approximate="tanh")
        return F.gelu(z, approximate="tanh"), dz, dz.sum(0, keepdim=True, dtype=_sum_dtype(z))
    (N, W), COLUMNS = z.shape, 512
    a, _, sums = _like_linear_gelu_gradient(dy, weight, z)
    _gelu_gradient[(len(sums), triton.cdiv(W, COLUMNS))](z, dz, a, sums, N, W, ROWS=ROWS, A=4, COLUMNS=COLUMNS)
    return a, dz, sums


@linear_gelu_gradient.register_fake
def _like_linear_gelu_gradient(dy, weight, z):
    blocks = -(-len(z) // ROWS) if takes_kernel(z) else 1
    return z.new_empty(z.shape), z.new_empty(z.shape), z.new_empty(blocks, z.shape[1], dtype=_sum_dtype(z))


def _sum_dtype(z):
    return torch.promote_types(z.dtype, torch.float32)


class _AddMLP(torch.autograd.Function):
    """Only what is fused is an operator of its own: the compiler sees, and calls, the other matrix products."""

    @staticmethod
    def forward(ctx, x, h, weight, bias, out_weight):
        z, a = linear_gelu(h, weight, bias)
        ctx.save_for_backward(h, z, weight, out_weight)
        ctx.bias_dtype = bias.dtype
        x = x.clone()  # as in residual.py
        add_product_(x, a, out_weight.T)
        return x

    @staticmethod
    def backward(ctx, dx):
        h, z, weight, out_weight = ctx.saved_tensors
        a, dz, sums = linear_gelu_gradient(dx, out_weight, z)
        return dx, dz @ weight, dz.T @ h, sums.sum(0).to(ctx.bias_dtype), dx.T @ a


def add_mlp(x, h, weight, bias, out_weight):
    """x + GELU(h weight^T + bias) out_weight^T, (N, C). Compiled, in the place of x.

    GELU by tanh: Hendrycks and Gimpel, arXiv 1606.08415, section 2.
    x and h (N, C), weight (W, C) and out_weight (C, W) of one dtype, that of autocast where it is on; bias (W), of that
    or a wider one.
    """
    return _AddMLP.apply(x, h, weight, bias, out_weight)
