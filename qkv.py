"""The projection to queries, keys and values for attention that gives their gradients in three tensors, as PyTorch's.

These have to be put together for the projection's matrix products, and summed up for its bias: one kernel does both.
"""

import torch

from add_norm import takes_kernel, triton
from mlp import ROWS

if triton is not None:
    import triton.language as tl

    @triton.jit
    def _pack(p_dq, p_dk, p_dv, p_out, p_sums, N, C, ROWS: tl.constexpr, A: tl.constexpr, COLUMNS: tl.constexpr):
        """ROWS rows and COLUMNS columns of one of the three, copied, and their sums over the rows."""
        i_rows, part, o_c = tl.program_id(0), tl.program_id(1), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        if part == 0:
            p_x = p_dq
        elif part == 1:
            p_x = p_dk
        else:
            p_x = p_dv
        first = i_rows.to(tl.int64) * ROWS * C
        b_sum = tl.zeros([A, COLUMNS], tl.float32)
        for start in range(0, ROWS, A):
            o_n = start + tl.arange(0, A)
            mask = (o_n < N - i_rows * ROWS)[:, None] & (o_c < C)[None, :]
            b_x = tl.load(p_x + first + o_n[:, None] * C + o_c[None, :], mask=mask, other=0.0)
            tl.store(p_out + 3 * first + part * C + o_n[:, None] * 3 * C + o_c[None, :], b_x, mask=mask)
            b_sum += b_x.to(tl.float32)
        tl.store(p_sums + (i_rows * 3 + part) * C + o_c, tl.sum(b_sum, 0), mask=o_c < C)


@torch.library.custom_op("gpt2::pack", mutates_args=())
def pack(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Three (B, H, T, D) as one (B T, 3 H D), and its sums over blocks of rows, (blocks, 3 H D) float32 or wider.

    To add these up is left to the compiler.
    """
    rows = [x.transpose(1, 2).flatten(2).flatten(0, 1).contiguous() for x in (dq, dk, dv)]
    out, sums = _like_pack(dq, dk, dv)
    if takes_kernel(dq):
        (N, C), tile = rows[0].shape, {"A": 32, "COLUMNS": 128, "num_warps": 2}
        _pack[len(sums), 3, triton.cdiv(C, tile["COLUMNS"])](*rows, out, sums, N, C, ROWS=ROWS, **tile)
    else:
        torch.cat(rows, 1, out=out)
        torch.sum(out, 0, keepdim=True, dtype=sums.dtype, out=sums)
    return out, sums


@pack.register_fake
def _like_pack(dq, dk, dv):
    B, H, T, D = dq.shape
    blocks = -(-B * T // ROWS) if takes_kernel(dq) else 1
    sums = dq.new_empty(blocks, 3 * H * D, dtype=torch.promote_types(dq.dtype, torch.float32))
    return dq.new_empty(B * T, 3 * H * D), sums


class _Projection(torch.autograd.Function):
    """Only the kernel is an operator of its own: the compiler sees, and calls, the matrix products."""

    @staticmethod
    def forward(ctx, x, weight, bias, n_head):
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = bias.dtype
        (B, T, C), rows = x.shape, x.flatten(0, 1)
        qkv = torch.addmm(bias.to(x.dtype), rows, weight.T).view(B, T, 3, n_head, C // n_head)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        x, weight = ctx.saved_tensors
        dqkv, sums = pack(dq, dk, dv)
        dx, dweight = dqkv @ weight, dqkv.T @ x.flatten(0, 1)
        return dx.view_as(x), dweight, sums.sum(0).to(ctx.bias_dtype), None


def queries_keys_values(x, weight, bias, n_head):
    """x weight^T + bias, as three (B, H, T, D).

    x (B, T, C) and weight (3C, C) of one dtype, that of autocast where it is on; bias (3C) of that or a wider one.
    """
    return _Projection.apply(x, weight, bias, n_head)
