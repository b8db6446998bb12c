"""Exact causal alpha-entmax attention in plain PyTorch: what tests the kernels, and what runs where they cannot.

Queries are taken in blocks of rows, so that the T x T scores are never whole in memory. In the comments, for one row: z
are its raw scores q.k, c = (alpha - 1) * scale, r = 1 / (alpha - 1), and u = c [z - max z - x]_+. Its probabilities are
p = u^r, with the threshold x (which is tau / c) such that they sum to 1.

x is the root of h(x) = |u|_r - 1 (the r-norm). h is convex and falls by at least c per unit, so Newton's step from any
point lands at the root or left of it, and from there climbs without ever passing it: there is no bracket to keep, and h
bounds how far the root is. For alpha = 2 this is the active-set method, which ends after finitely many steps.

Sources: Peters et al. 2019 (arXiv 1905.05702) for entmax and its gradient, AdaSplash (arXiv 2502.12082) for attention.
"""

import torch

MAX_STEPS = 100  # 4 to 7 are usual; the bound is for rows that rounding keeps from settling


def _parameters(alpha, r, scale):
    """(c, r), numbers where alpha is known to the host, else 0-d tensors: reading it would wait for the device."""
    if alpha is not None:
        alpha = alpha.item() if alpha.device.type == "cpu" else alpha.reshape(())
        r = 1 / (alpha - 1)
    return scale / r, r


def _blocks(q, k):
    """Yield (heads, rows, keys, mask): slices of q (N, R, D) and k (N, S, D), and what to add to their scores.

    keys are those up to the last one that the rows see; the last query is aligned with the last key.
    """
    (N, R, _), S = q.shape, k.shape[1]
    size = 1 << 18 if q.device.type == "cpu" else 1 << 26  # scores held at a time: a cache's worth, a fair load
    n_rows = min(R, max(32, size // (N * S)))
    for start in range(0, R, n_rows):
        rows = slice(start, min(start + n_rows, R))
        keys = slice(0, rows.stop + S - R)
        mask = torch.full((rows.stop - start, keys.stop), float("-inf"), dtype=q.dtype, device=q.device)
        mask.triu_(start + S - R + 1)
        n_heads = max(1, size // mask.numel())
        for head in range(0, N, n_heads):
            yield slice(head, head + n_heads), rows, keys, mask


def _powers(z, x, c, r):
    """Scores z less their row maxima -> u^r and u^(r - 1), the second zero where u is. No pow for alpha = 1.5 and 2."""
    u = torch.sub(z, x).relu_().mul_(c)
    if isinstance(r, int):
        return (u.square(), u) if r == 2 else (u, u.sign())
    lower = torch.pow(u, r - 1).masked_fill_(u == 0, 0)
    return u.mul_(lower), lower


def _solve(z, c, r):
    """Raw scores z (N, R, S), overwritten -> u^r (N, R, S); its sums, max z and x, (N, R, 1) each."""
    top = z.amax(-1, keepdim=True)
    z.sub_(top)
    # the middle of where x may be; a point below it would let every u^r underflow when alpha is near 1
    x = torch.zeros_like(top).sub_((1 + z.shape[-1] ** (-1 / r)) / (2 * c))
    tolerance = 8 * torch.finfo(z.dtype).eps  # on h; p divided by its sum is then exact to rounding
    for _ in range(MAX_STEPS):
        p, lower = _powers(z, x, c, r)
        total = p.sum(-1, keepdim=True)
        norm = total ** (1 / r)
        slope = lower.sum(-1, keepdim=True) * (norm / total * c)  # -h'
        step = (x + (norm - 1) / slope).clamp_min_(-1 / c)  # h >= 0 at -1 / c
        if not ((step != x) & ((norm - 1).abs() > tolerance)).any():
            break
        x = step
    return p, total, top, x


def attention_weights(q, k, alpha, scale):
    """Yield (heads, rows, p): the weights of some queries of some heads after the other, so that few are in memory.

    q: (B, H, R, D), k: (B, H, S, D) as entmax_reference takes them; alpha: a number, 1 < alpha <= 2.
    heads and rows are slices of the B H heads and the R queries, p (heads, rows, keys) their weights on the keys up to
    the last that these rows see: float32, or float64 for float64. A row sums to 1; what has no weight is exactly 0.
    """
    r = {1.5: 2, 2.0: 1}.get(alpha, 1 / (alpha - 1))
    q, k = _merge(q), _merge(k)
    for heads, rows, keys, mask in _blocks(q, k):
        with torch.autocast(q.device.type, enabled=False):  # not around the yield, or the caller would be in it too
            z = torch.baddbmm(mask, q[heads, rows], k[heads, keys].mT)
            p, total, _, _ = _solve(z, scale / r, r)
        yield heads, rows, p.div_(total)


def operator(name):
    """A decorator that makes a function of tensors, which changes none of them, the PyTorch operator of that name.

    So does torch.library.custom_op, but that takes some 45 µs more a call, and seconds at the first, which imports the
    compiler.
    """

    def register(function):
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(name, "default", function)
        namespace, own_name = name.split("::")
        return getattr(getattr(torch.ops, namespace), own_name).default

    return register


@operator("adasplash::entmax_reference")
def entmax_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: torch.Tensor | None, r: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B, H, R, D), k and v (B, H, S, D), R <= S -> out (B, H, R, D), and for the backward max z and x, (B H, R, 1).

    alpha: one-element float32 tensor, or None and r = 1 / (alpha - 1), 1 or 2.
    """
    c, r = _parameters(alpha, r, scale)
    out = heads_last(q)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = _merge(q), _merge(k), _merge(v)
        o, top, x = torch.empty_like(q), q.new_empty(*q.shape[:2], 1), q.new_empty(*q.shape[:2], 1)
        for n, i, j, mask in _blocks(q, k):
            z = torch.baddbmm(mask, q[n, i], k[n, j].mT)
            p, total, top[n, i], x[n, i] = _solve(z, c, r)
            o[n, i] = torch.bmm(p, v[n, j]).div_(total)
    return out.copy_(o.view(out.shape)), top, x


@torch.library.register_fake("adasplash::entmax_reference")
def _(q, k, v, alpha, r, scale):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = q.new_empty(q.shape[0] * q.shape[1], q.shape[2], 1, dtype=dtype)
    return heads_last(q), rows, torch.empty_like(rows)


@operator("adasplash::entmax_reference_backward")
def entmax_reference_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top: torch.Tensor, x: torch.Tensor,
    alpha: torch.Tensor | None, r: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    c, r = _parameters(alpha, r, scale)
    grads = heads_last(q), heads_last(k), heads_last(v)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, dout = _merge(q), _merge(k), _merge(v), _merge(dout)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for n, i, j, mask in _blocks(q, k):
            z = torch.baddbmm(mask, q[n, i], k[n, j].mT).sub_(top[n, i])
            p, u = _powers(z, x[n, i], c, r)  # u is p^(2 - alpha)
            dv[n, j].baddbmm_(p.mT, dout[n, i])
            dz = torch.bmm(dout[n, i], v[n, j].mT)  # the gradient of p
            dz.sub_((dz * u).sum(-1, keepdim=True) / u.sum(-1, keepdim=True)).mul_(u)
            if j.stop - i.stop + i.start == 0:
                dz[:, 0] = 0  # a row of one key: p is 1 whatever the score
            dq[n, i] = torch.bmm(dz, k[n, j]).mul_(scale)
            dk[n, j].baddbmm_(dz.mT, q[n, i], alpha=scale)
    return tuple(grad.copy_(x.view(grad.shape)) for grad, x in zip(grads, (dq, dk, dv), strict=True))


@torch.library.register_fake("adasplash::entmax_reference_backward")
def _(dout, q, k, v, top, x, alpha, r, scale):
    return heads_last(q), heads_last(k), heads_last(v)


def _setup_context(ctx, inputs, output):
    q, k, v, alpha, ctx.r, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output[1:], alpha)


def _backward(ctx, dout, *_):
    *saved, alpha = ctx.saved_tensors
    return *entmax_reference_backward(dout, *saved, alpha, ctx.r, ctx.scale), None, None, None


def refuse_second_derivative(ctx, *_):
    raise RuntimeError("causal_entmax_attention is differentiable once: its gradient has none (no create_graph=True)")


torch.library.register_autograd("adasplash::entmax_reference", _backward, setup_context=_setup_context)
torch.library.register_autograd("adasplash::entmax_reference_backward", refuse_second_derivative)


def _merge(x):
    """(B, H, T, D) -> (B H, T, D) in the precision of the sums."""
    return x.flatten(0, 1).to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()


def heads_last(x):
    """An empty tensor like x (B, H, T, D), in memory (B, T, H, D): what follows attention merges the heads."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)
