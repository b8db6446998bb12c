"""What stands between the layers of a transformer: the output of one joins the residual stream, normed for the next.

Each way that is one kernel, which reads and writes every tensor once. The backward's takes the gradient through the
norm, adds the one that comes along the stream, and sums up over the rows for the gradients of the norm's weight and
bias and of the bias of the layer before. At 65,536 x 768 in bfloat16 on an H100 they take 0.14 and 0.16 ms, where the
compiler's kernels took 0.14 and 0.22. (Its forward is as fast, but does not keep the sum, and computes it again.)
"""

import os

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = None  # not on this platform

PROGRAMS = 792  # 6 for each of an H100's multiprocessors; in the backward each gives sums of its rows

if triton is not None:
    INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs on CPU tensors, in Python

    @triton.jit
    def _normed(b_x, in_row, eps, C):
        """A row less its mean, over its standard deviation; and 1 over that."""
        b_x = tl.where(in_row, b_x - tl.sum(b_x, 0) / C, 0.0)
        scale = tl.rsqrt(tl.sum(b_x * b_x, 0) / C + eps)
        return b_x * scale, scale

    @triton.jit
    def _add_norm(p_x, p_y, p_y_bias, p_weight, p_bias, p_out, p_h, N, eps, C: tl.constexpr, COLUMNS: tl.constexpr):
        """out = x + y + y_bias, and h, its norm. A program takes every num_programs-th row."""
        o_c, in_row = tl.arange(0, COLUMNS), tl.arange(0, COLUMNS) < C
        b_y_bias = tl.load(p_y_bias + o_c, mask=in_row, other=0.0).to(tl.float32)
        b_weight = tl.load(p_weight + o_c, mask=in_row, other=0.0).to(tl.float32)
        b_bias = tl.load(p_bias + o_c, mask=in_row, other=0.0).to(tl.float32)
        for row in tl.range(tl.program_id(0), N, tl.num_programs(0), num_stages=3):
            o = tl.cast(row, tl.int64) * C + o_c
            b_x = tl.load(p_x + o, mask=in_row, other=0.0).to(tl.float32)
            b_x += tl.load(p_y + o, mask=in_row, other=0.0).to(tl.float32) + b_y_bias
            b_out = b_x.to(p_out.dtype.element_ty)
            tl.store(p_out + o, b_out, mask=in_row)
            b_x, _ = _normed(b_out.to(tl.float32), in_row, eps, C)
            tl.store(p_h + o, (b_x * b_weight + b_bias).to(p_h.dtype.element_ty), mask=in_row)

    @triton.jit
    def _add_norm_gradient(
        p_x, p_weight, p_bias, p_dx, p_dh, p_out, p_h, p_sums, N, eps,
        C: tl.constexpr, COLUMNS: tl.constexpr, AGAIN: tl.constexpr,
    ):  # fmt: skip
        """out = the gradient of x, from dx and that of its norm h, dh; h AGAIN; and the sums of a program's rows."""
        o_c, in_row = tl.arange(0, COLUMNS), tl.arange(0, COLUMNS) < C
        b_weight = tl.load(p_weight + o_c, mask=in_row, other=0.0).to(tl.float32)
        b_bias = tl.load(p_bias + o_c, mask=in_row, other=0.0).to(tl.float32)
        b_sum = tl.zeros([COLUMNS], tl.float32)
        b_dweight, b_dbias = b_sum, b_sum
        for row in tl.range(tl.program_id(0), N, tl.num_programs(0), num_stages=3):
            o = tl.cast(row, tl.int64) * C + o_c
            b_x = tl.load(p_x + o, mask=in_row, other=0.0).to(tl.float32)
            b_dh = tl.load(p_dh + o, mask=in_row, other=0.0).to(tl.float32)
            b_dx = tl.load(p_dx + o, mask=in_row, other=0.0).to(tl.float32)
            b_x, scale = _normed(b_x, in_row, eps, C)
            if AGAIN:
                tl.store(p_h + o, (b_x * b_weight + b_bias).to(p_h.dtype.element_ty), mask=in_row)
            b_g = b_dh * b_weight
            b_dx += scale * (b_g - tl.sum(b_g, 0) / C - b_x * (tl.sum(b_g * b_x, 0) / C))
            tl.store(p_out + o, b_dx.to(p_out.dtype.element_ty), mask=in_row)
            b_dweight, b_dbias, b_sum = b_dweight + b_dh * b_x, b_dbias + b_dh, b_sum + b_dx
        p_sums += tl.program_id(0) * 3 * C + o_c
        tl.store(p_sums, b_dweight, mask=in_row)
        tl.store(p_sums + C, b_dbias, mask=in_row)
        tl.store(p_sums + 2 * C, b_sum, mask=in_row)


def takes_kernel(x):
    """Whether tensors like x go to a Triton kernel: in float32 or 16 bits, on a GPU or to the interpreter."""
    return triton is not None and (x.is_cuda or INTERPRETED) and x.dtype != torch.float64


@torch.library.custom_op("gpt2::add_norm", mutates_args=())
def add_norm_rows(
    x: torch.Tensor, y: torch.Tensor, y_bias: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + y + y_bias, and its norm: (N, C) all, of one dtype; y_bias, weight and bias (C), of that or a wider one."""
    if not takes_kernel(x):
        x = x.contiguous() + y + y_bias.to(x.dtype)
        return x, F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    (N, C), (out, h) = x.shape, _like_add_norm(x, y, y_bias, weight, bias, eps)
    tensors = (t.contiguous() for t in (x, y, y_bias, weight, bias))
    _add_norm[min(N, PROGRAMS),](*tensors, out, h, N, eps, C=C, COLUMNS=triton.next_power_of_2(C))
    return out, h


@add_norm_rows.register_fake
def _like_add_norm(x, y, y_bias, weight, bias, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("gpt2::add_norm_gradient", mutates_args=())
def add_norm_gradient(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dx: torch.Tensor, dh: torch.Tensor, eps: float,
    again: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradient of x (N, C), where its norm h has the gradient dh, and whatever else comes of x gives dx.

    Then h, again, or (0, C). Then sums over rows, (programs, 3, C) float32 or wider, for the gradients of weight, bias
    and y_bias: to add these up is left to the compiler.
    """
    out, h, sums = _like_add_norm_gradient(x, weight, bias, dx, dh, eps, again)
    if takes_kernel(x):
        (N, C), columns = x.shape, triton.next_power_of_2(x.shape[1])
        tensors = (t.contiguous() for t in (x, weight, bias, dx, dh))
        constant = dict(C=C, COLUMNS=columns, AGAIN=again, num_warps=min(32, max(1, columns // 512)))
        _add_norm_gradient[len(sums),](*tensors, out, h, sums, N, eps, **constant)
        return out, h, sums
    x, weight, bias, dx, dh = (t.to(sums.dtype) for t in (x, weight, bias, dx, dh))
    variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
    scale = (variance + eps).rsqrt()
    normed, g = (x - mean) * scale, dh * weight
    dx = dx + scale * (g - g.mean(1, keepdim=True) - normed * (g * normed).mean(1, keepdim=True))
    sums[0] = torch.stack([(dh * normed).sum(0), dh.sum(0), dx.sum(0)])
    if again:
        h.copy_(normed * weight + bias)
    return out.copy_(dx), h, sums


@add_norm_gradient.register_fake
def _like_add_norm_gradient(x, weight, bias, dx, dh, eps, again):
    programs = min(len(x), PROGRAMS) if takes_kernel(x) else 1
    sums = x.new_empty(programs, 3, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), x.new_empty(len(x) if again else 0, x.shape[1]), sums


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, y_bias, weight, bias, eps):
        x, h = add_norm_rows(x, y, y_bias, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        return x, h

    @staticmethod
    def backward(ctx, dx, dh):
        x, weight, bias = ctx.saved_tensors
        dx, _, sums = add_norm_gradient(x, weight, bias, dx, dh, ctx.eps, False)
        dweight, dbias, dy_bias = sums.sum(0).to(weight.dtype).unbind(0)
        return dx, dx, dy_bias, dweight, dbias, None


def add_norm(x, y, y_bias, norm):
    """x + y + y_bias, and the norm of that, both like x.

    x and y (..., C) of one dtype, that of autocast where it is on; y_bias (C), and weight and bias of norm, an
    nn.LayerNorm, of that or a wider one. Ba, Kiros and Hinton, arXiv 1607.06450, section 3.1.
    """
    if not takes_kernel(x):
        x = x + y + y_bias.to(x.dtype)
        return x, norm(x)
    out, h = _AddNorm.apply(x.flatten(0, -2), y.flatten(0, -2), y_bias, norm.weight, norm.bias, norm.eps)
    return out.view_as(x), h.view_as(x)
