"""The projection to queries, keys and values, for attention.

PyTorch's gives their gradients in three tensors. These have to be put together for the projection's matrix products,
and summed up for its bias: one kernel does both. Ours gives them in one, of which only a part is to be summed up.
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


def _projection(ctx, x, weight, bias, n_head):
    """x weight^T + bias, (B, T, 3, H, D), and what the backward needs."""
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = bias.dtype
    B, T, C = x.shape
    return torch.addmm(bias.to(x.dtype), x.flatten(0, 1), weight.T).view(B, T, 3, n_head, C // n_head)


def _gradients(ctx, dqkv, dbias):
    x, weight = ctx.saved_tensors
    return (dqkv @ weight).view_as(x), dqkv.T @ x.flatten(0, 1), dbias.to(ctx.bias_dtype), None


class _Projection(torch.autograd.Function):
    """Only the kernel is an operator of its own: the compiler sees, and calls, the matrix products."""

    @staticmethod
    def forward(ctx, x, weight, bias, n_head):
        return _projection(ctx, x, weight, bias, n_head).permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        dqkv, sums = pack(dq, dk, dv)
        return _gradients(ctx, dqkv, sums.sum(0))


class _PackedProjection(torch.autograd.Function):
    forward = staticmethod(_projection)

    @staticmethod
    def backward(ctx, dqkv):
        dqkv = dqkv.flatten(2).flatten(0, 1)
        C, wide = dqkv.shape[1] // 3, torch.promote_types(dqkv.dtype, torch.float32)
        of_keys = torch.arange(3 * C, device=dqkv.device) // C == 1
        return _gradients(ctx, dqkv, torch.where(of_keys, 0, dqkv).sum(0, dtype=wide))  # compiled, it reads the others


def queries_keys_values(x, weight, bias, n_head):
    """x weight^T + bias, as three (B, H, T, D).

    x (B, T, C) and weight (3C, C) of one dtype, that of autocast where it is on; bias (3C) of that or a wider one.
    """
    return _Projection.apply(x, weight, bias, n_head)


def queries_keys_values_packed(x, weight, bias, n_head):
    """The same as one (B, T, 3, H, D). Only for attention: without looking, it gives the keys' bias a gradient of zero.

    That bias shifts all scores of a query alike, of which neither softmax nor entmax takes notice.
    """
    return _PackedProjection.apply(x, weight, bias, n_head)
