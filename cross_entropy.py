"""The loss of a linear head, whose logits (B T, V) are never whole: they are by far the largest tensor of a GPT-2.

Rows are taken in blocks. A block's logits are overwritten by their gradient while they are at hand, and that is used up
at once for the gradients of the hidden states and of the weights: the forward pass does it all, the backward pass only
scales. (llm.c's fused classifier is of the same kind.)
"""

import os

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = None  # not on this platform

ROWS = 8192  # of logits at a time: enough for a matrix product at full speed, 0.8 GB of bfloat16 at GPT-2's vocabulary


if triton is not None:
    INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
    LOG2_E = tl.constexpr(1.4426950408889634)

    @triton.jit
    def _again(b_x):
        """b_x, hiding that it is the same: what follows from it is then computed again, not kept in registers."""
        if not INTERPRETED and b_x.dtype.primitive_bitwidth == 16:
            b_x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [b_x], b_x.dtype, is_pure=False, pack=2)
        return b_x

    @triton.jit
    def _cross_entropy(
        p_z, p_target, p_loss, stride, V, n_padded, scale,
        FULL: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """One row of logits: its loss, and in the row's place scale times the gradient of that.

        The row is read once and, of 16 bits, stays in registers: PARTS of COLUMNS, the first FULL without padding. All
        is to base 2, whose powers are one instruction.
        """
        i = tl.program_id(0).to(tl.int64)
        p_z += i * stride
        p_of_target = p_z + tl.load(p_target + i)
        of_target = tl.load(p_of_target).to(tl.float32) * LOG2_E
        row = ()
        for part in tl.static_range(PARTS):  # all loads first
            o = part * COLUMNS + tl.arange(0, COLUMNS)
            if part < FULL:
                row += (tl.load(p_z + o),)
            else:  # by n_padded, which Triton sees to be a multiple of 16, whole vectors are loaded; not by V
                row += (tl.where(o < V, tl.load(p_z + o, mask=o < n_padded, other=0.0), float("-inf")),)
        b_top = row[0].to(tl.float32)
        for part in tl.static_range(1, PARTS):
            b_top = tl.maximum(b_top, row[part].to(tl.float32))
        top = tl.max(b_top, 0) * LOG2_E
        b_sum = tl.zeros([COLUMNS], tl.float32)
        for part in tl.static_range(PARTS):
            b_sum += tl.exp2(_again(row[part]).to(tl.float32) * LOG2_E - top)
        log_sum = top + tl.log2(tl.sum(b_sum, 0))
        tl.store(p_loss + i, (log_sum - of_target) / LOG2_E)
        for part in tl.static_range(PARTS):
            o = part * COLUMNS + tl.arange(0, COLUMNS)
            b_p = tl.exp2(_again(row[part]).to(tl.float32) * LOG2_E - log_sum)
            tl.store(p_z + o, (scale * b_p).to(p_z.dtype.element_ty), mask=None if part < FULL else o < n_padded)
        tl.debug_barrier()  # else another thread could store the target's column afterwards
        tl.store(p_of_target, (scale * (tl.exp2(of_target - log_sum) - 1)).to(p_z.dtype.element_ty))


def _to_gradients(logits, targets, vocab_size, scale):
    """Overwrite a block of logits (R, V) by scale times the gradients of its losses; returns those, (R,) float32.

    Columns from vocab_size on are no tokens: they take no part, and their gradient is 0.
    """
    if triton is not None and (logits.is_cuda or INTERPRETED.value):
        (N, n_padded), COLUMNS = logits.shape, 2048
        # as few as hold the row, 200 registers a thread (up to 8 can): two rows of 50,304 then share a multiprocessor,
        # and one computes while the other is loaded or stored
        num_warps = min(32, max(4, triton.next_power_of_2(triton.cdiv(n_padded * logits.element_size(), 32 * 800))))
        losses = torch.empty(N, dtype=torch.float32, device=logits.device)
        _cross_entropy[(N,)](
            logits, targets, losses, logits.stride(0), vocab_size, n_padded, scale,
            FULL=vocab_size // COLUMNS, PARTS=triton.cdiv(n_padded, COLUMNS), COLUMNS=COLUMNS,
            num_warps=num_warps,
        )  # fmt: skip
        return losses
    real = logits[:, :vocab_size].float()
    losses = F.cross_entropy(real, targets, reduction="none")
    gradient = F.softmax(real, dim=1)
    gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
    logits[:, :vocab_size] = gradient.mul_(scale)
    logits[:, vocab_size:] = 0
    return losses


@torch.library.custom_op("gpt2::head_loss", mutates_args=())
def head_loss(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean cross-entropy in nats, () float32, of the logits x weight^T; its gradients by x and by weight.

    x: (N, C) hidden states, N > 0, in the dtype of the products: bfloat16, or weight's; weight: (V, C) float32;
    targets: (N,) int64, from 0 to vocab_size - 1, which nobody checks.
    """
    N, losses, dx, targets = len(x), [], torch.empty_like(x), targets.contiguous()
    dweight = torch.zeros_like(weight)
    with torch.autocast(x.device.type, enabled=False):
        rounded = weight.to(x.dtype)
        for start in range(0, N, ROWS):
            rows = slice(start, start + ROWS)
            logits = x[rows] @ rounded.T
            losses.append(_to_gradients(logits, targets[rows], vocab_size, 1 / N))
            torch.mm(logits, rounded, out=dx[rows])
            if x.dtype == weight.dtype:
                dweight.addmm_(logits.T, x[rows])
            elif x.is_cuda:  # which sums 16 bits up in 32
                torch.addmm(dweight, logits.T, x[rows], out_dtype=dweight.dtype, out=dweight)
            else:
                dweight += logits.T @ x[rows]
    return torch.cat(losses).mean(), dx, dweight


@head_loss.register_fake
def _(x, weight, targets, vocab_size):
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(weight)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for those, either


def _backward(ctx, dloss, *_):
    dx, dweight = ctx.saved_tensors
    return dx * dloss.to(dx.dtype), dweight * dloss, None, None


head_loss.register_autograd(_backward, setup_context=_setup_context)
