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
    INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

    @triton.jit
    def _cross_entropy(p_z, p_target, p_loss, stride, V, n_padded, scale, A: tl.constexpr, COLUMNS: tl.constexpr):
        """One row of logits: its loss, and in the row's place scale times the gradient of that."""
        i = tl.program_id(0).to(tl.int64)
        p_z += i * stride
        target = tl.load(p_target + i)
        o = tl.arange(0, A)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        top = tl.full([COLUMNS], -1e38, tl.float32)  # not -inf, whose difference to itself is NaN
        total = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, V, A * COLUMNS):  # each column has its own running maximum and sum: no thread waits
            b_z = tl.load(p_z + start + o, mask=start + o < V, other=float("-inf")).to(tl.float32)
            new = tl.maximum(top, tl.max(b_z, 0))
            total = total * tl.exp(top - new) + tl.sum(tl.exp(b_z - new[None, :]), 0)
            top = new
        row_top = tl.max(top, 0)
        log_sum = row_top + tl.log(tl.sum(total * tl.exp(top - row_top), 0))
        tl.store(p_loss + i, log_sum - tl.load(p_z + target).to(tl.float32))
        tl.debug_barrier()  # all have read the target's logit before it is overwritten
        for start in range(0, n_padded, A * COLUMNS):
            b_z = tl.load(p_z + start + o, mask=start + o < V, other=float("-inf")).to(tl.float32)
            b_p = tl.exp(b_z - log_sum) - tl.where(start + o == target, 1.0, 0.0)
            tl.store(p_z + start + o, (scale * b_p).to(p_z.dtype.element_ty), mask=start + o < n_padded)


def _to_gradients(logits, targets, vocab_size, scale):
    """Overwrite a block of logits (R, V) by scale times the gradients of its losses; returns those, (R,) float32.

    Columns from vocab_size on are no tokens: they take no part, and their gradient is 0.
    """
    if triton is not None and (logits.is_cuda or INTERPRETED):
        losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        _cross_entropy[(len(logits),)](
            logits, targets, losses, logits.stride(0), vocab_size, logits.shape[1], scale,
            A=2, COLUMNS=2048, num_warps=8,
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

    x: (N, C) hidden states, in the dtype of the products; weight: (V, C) float32; targets: (N,) int64 < vocab_size.
    """
    N, losses, dx = len(x), [], torch.empty_like(x)
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
            else:
                dweight += logits.T @ x[rows]
    return torch.cat(losses).mean(), dx, dweight


@head_loss.register_fake
def _(x, weight, targets, vocab_size):
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(weight)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def _backward(ctx, dloss, *_):
    dx, dweight = ctx.saved_tensors
    return dx * dloss.to(dx.dtype), dweight * dloss, None, None


head_loss.register_autograd(_backward, setup_context=_setup_context)
