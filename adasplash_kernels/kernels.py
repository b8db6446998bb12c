"""Causal alpha-entmax attention in Triton: the paper's algorithms; scores are recomputed tile by tile, never stored.

For one row, z are its raw scores q.k, c = (alpha - 1) * scale, r = 1 / (alpha - 1), u = [c (z - max z) - tau]_+, and
its probabilities are p = u^r; docs/kernels.md says how tau is found. A tile is TILE queries by TILE keys. On the
diagonal some queries do not see some keys. A program takes the queries (or the keys) of one tile and visits tiles by a
list:

    forward    finds the row maxima and, on the way, a threshold that tau cannot be below and an estimate of tau; lists
               the tiles that exceed that threshold somewhere; sweeps over these until tau stands; adds up the output
               and marks on a map what has support
    lists      turns the map into lists by query block, or by key block
    query_gradient, key_value_gradient      visit the listed tiles only

Each output is written by one program, in a fixed order: two calls give the same bits.

Constants: R is r where alpha is known, 1 or 2, else 0, or -1 where accuracy is that of 16 bits; EXACT, inputs are
float32; BD is D, padded to a power of two.

Sources: AdaSplash (arXiv 2502.12082): algorithm 3 (tau, here with Newton's step for Halley's), 2 (forward), 5 (dQ) and
4 (dK, dV).
"""

import os

import torch
import triton
import triton.language as tl

from adasplash_kernels.reference import heads_last, operator

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # Triton runs on CPU tensors, in Python
NAN = tl.constexpr(tl.PropagateNan.ALL)
MAX_SWEEPS = tl.constexpr(60)  # 1 to 3 are usual; the bound is for rows that rounding keeps from settling
LIMIT = tl.constexpr(65536.0)  # where u saturates in the first pass, in which the maxima are not known yet
INFINITY = tl.constexpr(float("inf"))

# -----------------------------------------------------------------------------
# tiles


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=NAN)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _max(b_x):
    """Along axis 1, NaN (or inf, which becomes NaN later) where there is one."""
    if INTERPRETED:  # whose reductions by a function of one's own are slow
        return tl.max(tl.where(b_x == b_x, b_x, INFINITY), 1)
    else:
        return tl.reduce(b_x, 1, _larger)


@triton.jit
def _parts(b_x):
    """[M, N] -> [M, N / 8, 8]: a reduction of the middle axis takes no exchange between threads."""
    return tl.reshape(b_x, [b_x.shape[0], b_x.shape[1] // 8, 8])


@triton.jit
def _marks(p_8, EXACT: tl.constexpr):
    """From sums [M, 8], 1 where there is support (NaN counts): [M / 16, 8, 4] of a thread's own, for _word."""
    M: tl.constexpr = p_8.shape[0]
    if EXACT:  # else there is no NaN
        p_8 = tl.where(p_8 != 0, 1.0, 0.0)
    return (tl.sum(tl.sum(tl.reshape(p_8, [M // 16, 2, 8, 4, 2]), 4), 1) > 0).to(tl.int32)


@triton.jit
def _word(bits):
    """All the bits in one integer."""
    return tl.reduce(tl.reduce(tl.reduce(bits, 2, _either), 1, _either), 0, _either)


@triton.jit
def _dot(b_x, b_y, b_sum):
    if INTERPRETED:  # which takes bfloat16 for the integers that hold it
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, b_sum, input_precision="ieee")


@triton.jit
def _pointers(p_x, stride, i_block, BD: tl.constexpr, BLOCK: tl.constexpr):
    """To rows i_block * BLOCK.. of x (T, D), which lie stride apart: [BLOCK, BD]."""
    p_block = p_x + tl.cast(i_block, tl.int64) * BLOCK * stride
    return p_block + (tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, BD)[None, :])


@triton.jit
def _load(p_x, stride, i_block, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of x, all of them within T; zero beyond D."""
    p_block = _pointers(p_x, stride, i_block, BD, BLOCK)
    if D == BD:
        return tl.load(p_block)
    else:
        return tl.load(p_block, mask=(tl.arange(0, BLOCK)[:, None] >= 0) & (tl.arange(0, BD)[None, :] < D), other=0.0)


@triton.jit
def _load_last(p_x, stride, i_block, T, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr):
    """The same where some rows may be beyond T: these are zero."""
    mask = (tl.arange(0, BLOCK)[:, None] < T - i_block * BLOCK) & (tl.arange(0, BD)[None, :] < D)
    return tl.load(_pointers(p_x, stride, i_block, BD, BLOCK), mask=mask, other=0.0)


@triton.jit
def _store(p_x, stride, i_block, T, b_x, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr):
    mask = (tl.arange(0, BLOCK)[:, None] < T - i_block * BLOCK) & (tl.arange(0, BD)[None, :] < D)
    tl.store(_pointers(p_x, stride, i_block, BD, BLOCK), b_x.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def _in_registers(b_x, EXACT: tl.constexpr):
    """b_x, 16 bits, hiding that it was loaded: the tensor cores then take it from registers, not from shared memory.

    Products of 64 columns or fewer use up the bandwidth of shared memory, so that what stays is better kept elsewhere.
    """
    if EXACT or INTERPRETED or b_x.shape[1] > 64:
        return b_x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [b_x], b_x.dtype, is_pure=True, pack=2)


@triton.jit
def _causal(b_z, o_q, j):
    """Scores of the keys of block j, with -inf where the query does not see the key."""
    return tl.where(o_q[:, None] >= j * b_z.shape[1] + tl.arange(0, b_z.shape[1])[None, :], b_z, -INFINITY)


@triton.jit
def _saturated(b_x, m, b_a):
    """x m + a between 0 and 1, 0 for NaN: one instruction at full rate, which a maximum is not."""
    if INTERPRETED:
        b_u = b_x * m + b_a
        return tl.where(b_u == b_u, tl.minimum(tl.maximum(b_u, 0.0), 1.0), 0.0)
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [b_x, m, b_a], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _above(b_z, top, tau, c, EXACT: tl.constexpr):
    """u, where top is the maximum (or 0, and tau c times the maximum more).

    Without EXACT rounded once more, to 2^-24 of the largest score, and 0 for NaN: the maximum of a row with NaN is NaN,
    so that its sums are 0, and 0 times 1 / 0 is NaN again.
    """
    if EXACT:
        return tl.maximum((b_z - top) * c - tau, 0.0, propagate_nan=NAN)
    else:
        return _saturated(b_z, c, -(top * c + tau))


@triton.jit
def _above_any(b_z, top, tau, c, R: tl.constexpr, EXACT: tl.constexpr):
    """u where top need not be the maximum; for R = 1 and 2 without EXACT, u / LIMIT, at most 1."""
    if EXACT:
        return tl.maximum((b_z - top) * c - tau, 0.0, propagate_nan=NAN)
    elif R > 0:
        return _saturated(b_z, c * (1 / LIMIT), -(top * c + tau) * (1 / LIMIT))
    else:
        return tl.maximum(b_z * c - (top * c + tau), 0.0, propagate_nan=NAN)


@triton.jit
def _log2(b_x, R: tl.constexpr):
    """To fp32 rounding, by some twenty instructions, where R = 0; else to 2^-22, by the one there is for it."""
    if R == 0 or INTERPRETED:
        return tl.log2(b_x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [b_x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _inverse(x, EXACT: tl.constexpr):
    """1 / x, without EXACT to 2^-22."""
    if EXACT or INTERPRETED:
        return 1 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _powers(b_u, r, R: tl.constexpr):
    """u^r and u^(r - 1), the second zero where u is. No power function for alpha = 1.5 (R = 2) and 2 (R = 1)."""
    if R == 2:
        return b_u * b_u, b_u
    elif R == 1:
        return b_u, tl.where(b_u <= 0, 0.0, 1.0)
    else:
        b_lower = tl.where(b_u <= 0, 0.0, tl.exp2((r - 1) * _log2(b_u, R)))
        return b_u * b_lower, b_lower


@triton.jit
def _power(f, r, R: tl.constexpr):
    """f^(r - 1)"""
    if R == 2:
        return f
    elif R == 1:
        return f * 0 + 1
    else:
        return tl.exp2((r - 1) * _log2(f, R))


@triton.jit
def _newton(total, lower, alpha, R: tl.constexpr, EXACT: tl.constexpr):
    """From the row sums of u^r and u^(r - 1): h = |u|_r - 1, and Newton's step, -h / h'."""
    if R == 2:
        norm = tl.sqrt(total)
        return norm - 1, (norm - 1) * norm * _inverse(lower, EXACT)
    elif R == 1:
        return total - 1, (total - 1) * _inverse(lower, EXACT)
    else:
        norm = tl.exp2((alpha - 1) * tl.log2(total))
        return norm - 1, (norm - 1) * total / norm / lower


@triton.jit
def _exponent(tau, total, lower, r, EXACT: tl.constexpr):
    """The m for which total, a function of tau, behaves here as |tau|^m; it does exactly where one key has it all."""
    return tl.minimum(tl.maximum(-tau * lower * _inverse(total, EXACT), 1.0), 1e6) * r


@triton.jit
def _guess(tau, total, lower, r, R: tl.constexpr, EXACT: tl.constexpr):
    """Where total, behaving so, would be 1."""
    return tau * tl.exp2(-_log2(total, R) * _inverse(_exponent(tau, total, lower, r, EXACT), EXACT))


@triton.jit
def _parameters(p_alpha, scale, R: tl.constexpr):
    """alpha, r and c."""
    if R <= 0:
        alpha = tl.load(p_alpha)
    else:
        alpha = 1.0 + 1.0 / R
    return alpha, 1 / (alpha - 1), (alpha - 1) * scale


# -----------------------------------------------------------------------------
# forward


@triton.jit
def _shrink(total, lower, before, after, r, R: tl.constexpr, EXACT: tl.constexpr):
    """total and lower of some keys, the largest of which was at u = before, where that is at u = after.

    Its own share is known; the rest goes by _exponent.
    """
    before = tl.maximum(before, 1e-6)
    f = tl.maximum(tl.minimum(after * _inverse(before, EXACT), 1.0), 1e-6)
    p, p_lower = _powers(before, r, R)
    p, p_lower = tl.minimum(p, total), tl.minimum(p_lower, lower)
    rest, rest_lower = total - p, lower - p_lower
    f_lower = _power(f, r, R)
    rest_f = tl.exp2((_exponent(-before, rest, rest_lower, r, EXACT) - 1) * _log2(f, R))
    return f * (p * f_lower + rest * rest_f), p_lower * f_lower + rest_lower * rest_f


@triton.jit
def _rise(
    top, floor, least, most, total, lower, new_top, new_total, new_lower, c, alpha, r,
    R: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Raise the floor under tau, given the maximum of some more keys and, at the present floor, their sums.

    Of the keys before, least <= sum u^r and most >= sum u^(r - 1). Newton's step from below the root does not pass it,
    nor does it with such bounds for the sums. total and lower, estimates of the sums, follow.
    """
    both = _larger(top, new_top)
    new_floor = floor - (both - top) * c
    far = new_floor < -LIMIT  # maxima far above what was: u may have saturated
    inverse = _inverse(new_floor, EXACT)
    _, step = _newton(least + new_total, most + new_lower, alpha, R, EXACT)
    # floors are < 0 and end up at -1 or above; 1e-6 is for rounding
    f = tl.where(far, 1.0, 1 + step * inverse + 1e-6)
    f = tl.maximum(tl.minimum(f, tl.minimum(-inverse, 1.0)), 1e-6)
    old_f = tl.maximum(1 - new_floor * _inverse(floor, EXACT) * (1 - f), 1e-6)
    # each u, at most the distance to the maximum, shrinks by f or more; from far away to 1 or less, of up to 1e6 keys
    most = most * _power(old_f, r, R) + tl.where(far, 1e6, new_lower * _power(f, r, R))
    new_floor *= f
    total, lower = _shrink(total, lower, -floor, (top - both) * c - new_floor, r, R, EXACT)
    new_total, new_lower = _shrink(
        new_total, new_lower, (new_top - top) * c - floor, (new_top - both) * c - new_floor, r, R, EXACT
    )
    return both, new_floor, most, tl.maximum(total + new_total, 1.0), tl.maximum(lower + new_lower, 1.0)


@triton.jit(do_not_specialize=["T", "H", "n"])
def _forward(
    p_q, p_k, p_v, p_o, p_top, p_tau, p_list, p_map, p_alpha, scale, T, H, n,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    i_bh, i_q = tl.program_id(0) // n, n - 1 - tl.program_id(0) % n  # the longest rows first
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_o += (i_b * T * H + i_h) * D
    p_list += tl.program_id(0).to(tl.int64) * n
    p_map += (i_bh.to(tl.int64) * n + i_q) * n
    alpha, r, c = _parameters(p_alpha, scale, R)
    o_q = i_q * TILE + tl.arange(0, TILE)
    o_32 = tl.arange(0, 32)
    b_q = _load_last(p_q, s_qt, i_q, T, D, BD, TILE)

    # The tile on the diagonal and the one before it come first, since near keys are often the largest
    zero, zero_8 = tl.zeros([TILE], tl.float32), tl.zeros([TILE, 8], tl.float32)
    b_y = _dot(b_q, tl.trans(_load_last(p_k, s_kt, tl.maximum(i_q - 1, 0), T, D, BD, TILE)), None)
    b_y = tl.where(i_q > 0, b_y, -INFINITY)  # the first has none before it
    b_z = _causal(_dot(b_q, tl.trans(_load_last(p_k, s_kt, i_q, T, D, BD, TILE)), None), o_q, i_q)
    near = _max(b_y)
    top, floor = _larger(_max(b_z), near), zero - 1
    b_p, b_lower = _powers(_above(b_z, top[:, None], floor[:, None], c, EXACT), r, R)
    total_8, lower_8 = tl.sum(_parts(b_p), 1), tl.sum(_parts(b_lower), 1)
    b_p, b_lower = _powers(_above(b_y, top[:, None], floor[:, None], c, EXACT), r, R)
    total, lower = tl.sum(total_8 + tl.sum(_parts(b_p), 1), 1), tl.sum(lower_8 + tl.sum(_parts(b_lower), 1), 1)
    top, floor, most, total, lower = _rise(top, floor, zero, zero, zero, zero, top, total, lower, c, alpha, r, R, EXACT)

    # Then all others, backwards: the row maxima, and the list of the tiles that exceed the floor somewhere
    n_list = tl.max((((near - top) * c >= floor) & (o_q < T)).to(tl.int32), 0)
    tl.store(p_list, (i_q - 1).to(tl.int16), mask=n_list > 0)
    for done in range(1, i_q, 32):  # 32 tiles: a bit of an int a tile, so that warps need not meet at each tile
        bits = tl.zeros([TILE // 16, 8, 4], tl.int32)
        # sums and maxima stay in 8 parts of a row, which takes no exchange between threads, until they are used
        top_8, total_8, lower_8 = zero_8 - INFINITY, zero_8, zero_8
        for i in range(0, tl.minimum(i_q - done, 32)):
            b_z = _dot(b_q, tl.trans(_load(p_k, s_kt, i_q - 1 - done - i, D, BD, TILE)), None)
            top_8 = _larger(top_8, _max(_parts(b_z)))
            b_u = _above_any(b_z, top[:, None], tl.where(o_q < T, floor, INFINITY)[:, None], c, R, EXACT)
            b_p, b_lower = _powers(b_u, r, R)
            p_8 = tl.sum(_parts(b_p), 1)
            total_8, lower_8 = total_8 + p_8, lower_8 + tl.sum(_parts(b_lower), 1)
            if EXACT or R <= 0:  # where the maximum is NaN, so are the sums, and only that row is to be passed over
                p_8 = tl.where(p_8 > 0, 1.0, 0.0)
            bits |= _marks(p_8, False) << i
        new_total, new_lower = tl.sum(total_8, 1), tl.sum(lower_8, 1)
        if R == 2 and not EXACT:
            new_total, new_lower = new_total * (LIMIT * LIMIT), new_lower * LIMIT
        elif R == 1 and not EXACT:
            new_total *= LIMIT
        top, floor, most, total, lower = _rise(
            top, floor, zero + 1, most, total, lower, _max(top_8), new_total, new_lower, c, alpha, r, R, EXACT
        )
        flags = (_word(bits) >> o_32) & 1
        tl.store(p_list + n_list + tl.cumsum(flags, 0) - flags, (i_q - 1 - done - o_32).to(tl.int16), mask=flags > 0)
        n_list += tl.sum(flags, 0)
    tl.debug_barrier()  # the list is read by all from here

    # Sweeps over the listed tiles and the diagonal, until tau stands. Rows beyond T have none, and are not waited for
    ceiling = -tl.exp2((1 - alpha) * tl.log2((o_q + 1).to(tl.float32)))  # equal scores have tau here, others below
    ceiling = tl.where(o_q < T, ceiling, INFINITY)
    floor = tl.where(o_q < T, floor, INFINITY)
    tau = tl.maximum(tl.minimum(_guess(floor, total, lower, r, R, EXACT), ceiling), floor)
    go = 1
    while go > 0:
        total_8, lower_8 = zero_8, zero_8
        for i in range(0, n_list):
            j = tl.load(p_list + i).to(tl.int32)
            b_z = _dot(b_q, tl.trans(_load(p_k, s_kt, j, D, BD, TILE)), None)
            b_p, b_lower = _powers(_above(b_z, top[:, None], tau[:, None], c, EXACT), r, R)
            total_8, lower_8 = total_8 + tl.sum(_parts(b_p), 1), lower_8 + tl.sum(_parts(b_lower), 1)
        b_z = _causal(_dot(b_q, tl.trans(_load_last(p_k, s_kt, i_q, T, D, BD, TILE)), None), o_q, i_q)
        b_p, b_lower = _powers(_above(b_z, top[:, None], tau[:, None], c, EXACT), r, R)
        total = tl.sum(total_8 + tl.sum(_parts(b_p), 1), 1)
        lower = tl.sum(lower_8 + tl.sum(_parts(b_lower), 1), 1)
        h, step = _newton(total, lower, alpha, R, EXACT)
        if EXACT:
            unsettled = tl.abs(h) > 1e-6
        else:  # the step from here leaves, as a rule, less than the rounding of p to 16 bits
            tolerance: tl.constexpr = 0.06 if p_q.dtype.element_ty == tl.float16 else 0.24
            bound = tl.minimum(tolerance * (alpha - 1), tolerance / 2)
            m = _exponent(tau, total, lower, 1.0, EXACT)  # from below the root it leaves about (1 - 1 / m) h^2
            unsettled = h * h * tl.where(h > 0, 2 - 2 * _inverse(m, EXACT), 1.0) > bound * bound
        new_tau = tau + step
        if go <= 2:  # the guess lands nearer to the root, on either side
            new_tau = tl.where(unsettled, tl.maximum(new_tau, _guess(tau, total, lower, r, R, EXACT)), new_tau)
        new_tau = tl.minimum(tl.maximum(new_tau, floor), ceiling)
        moving = unsettled & (new_tau != tau) & (o_q < T)  # a row with NaN has none, or a tau that stands
        tau = new_tau
        go = tl.where(go < MAX_SWEEPS, go + 1, 0) * tl.max(moving.to(tl.int32), 0)

    # The output, and which of the listed tiles have support
    nan = tl.max(((top != top) & (o_q < T)).to(tl.int32), 0)  # has support, though u be 0
    total_8, b_o = zero_8, tl.zeros([TILE, BD], tl.float32)
    for done in range(0, n_list, 32):
        bits = tl.zeros([TILE // 16, 8, 4], tl.int32)
        for i in range(0, tl.minimum(n_list - done, 32)):
            j = tl.load(p_list + done + i).to(tl.int32)
            b_z = _dot(b_q, tl.trans(_load(p_k, s_kt, j, D, BD, TILE)), None)
            b_p = _powers(_above(b_z, top[:, None], tau[:, None], c, EXACT), r, R)[0]
            b_v = _load(p_v, s_vt, j, D, BD, TILE)
            b_o = _dot(b_p.to(b_v.dtype), b_v, b_o)
            p_8 = tl.sum(_parts(b_p), 1)
            total_8 += p_8
            bits |= _marks(p_8, EXACT) << i
        flags = ((_word(bits) | -nan) >> o_32) & 1
        listed = done + o_32 < n_list
        tiles = tl.load(p_list + done + o_32, mask=listed, other=0).to(tl.int32)
        tl.store(p_map + tiles, flags.to(tl.int8), mask=listed)
    b_z = _causal(_dot(b_q, tl.trans(_load_last(p_k, s_kt, i_q, T, D, BD, TILE)), None), o_q, i_q)
    b_p = _powers(_above(b_z, top[:, None], tau[:, None], c, EXACT), r, R)[0]
    b_v = _load_last(p_v, s_vt, i_q, T, D, BD, TILE)
    b_o = _dot(b_p.to(b_v.dtype), b_v, b_o)
    p_8 = tl.sum(_parts(b_p), 1)
    tl.store(p_map + i_q, ((_word(_marks(p_8, EXACT)) | -nan) & 1).to(tl.int8))

    total = tl.sum(total_8 + p_8, 1)
    _, step = _newton(total, lower, alpha, R, EXACT)  # lower is the last sweep's: nearly the same
    tau = tl.minimum(tl.maximum(tau + step, floor), ceiling)
    o_row = i_bh.to(tl.int64) * n * TILE + o_q
    if EXACT:
        tl.store(p_top + o_row, top)
    else:
        tau += top * c
    tl.store(p_tau + o_row, tl.where(o_q < T, tau, 1e30))  # p is 0 beyond T
    _store(p_o, H * D, i_q, T, b_o * (1 / total)[:, None], D, BD, TILE)


# -----------------------------------------------------------------------------
# backward


@triton.jit(do_not_specialize=["n", "s_line", "s_entry"])
def _lists(p_map, p_list, p_count, n, s_line, s_entry, BLOCK: tl.constexpr):
    """The tiles off the diagonal that are marked in each line (row or column) of the map (n, n), ascending."""
    i_bh, i_line = (tl.program_id(0) // n).to(tl.int64), (tl.program_id(0) % n).to(tl.int64)
    p_map += i_bh * n * n + i_line * s_line
    p_list += tl.program_id(0).to(tl.int64) * n
    n_list = 0
    for start in range(0, n, BLOCK):
        o_i = start + tl.arange(0, BLOCK)
        mask = (o_i < n) & (o_i != i_line)
        flags = tl.load(p_map + tl.cast(o_i, tl.int64) * s_entry, mask=mask, other=0).to(tl.int32)
        tl.store(p_list + n_list + tl.cumsum(flags, 0) - flags, o_i.to(tl.int16), mask=flags > 0)
        n_list += tl.sum(flags, 0)
    tl.store(p_count + tl.program_id(0), n_list)


@triton.jit
def _query_visit(
    b_g, b_l, g_8, l_8, j, b_q, b_zo, mean, top, tau, o_q, p_k, p_v, s_kt, s_vt, T, c, r,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Add the keys of block j to the sums of _query_gradient."""
    if DIAGONAL:
        b_k = _load_last(p_k, s_kt, j, T, D, BD, BN)
        b_v = _load_last(p_v, s_vt, j, T, D, BD, BN)
    else:
        b_k = _load(p_k, s_kt, j, D, BD, BN)
        b_v = _load(p_v, s_vt, j, D, BD, BN)
    b_z = _dot(b_q, tl.trans(b_k), None)  # [TILE, BN]
    b_zp = _dot(b_zo, tl.trans(b_v), None)
    if DIAGONAL:
        b_z = _causal(b_z, o_q, j)
    _, b_lower = _powers(_above(b_z, top, tau, c, EXACT), r, R)  # p^(2 - alpha)
    b_zs = b_lower * (b_zp - mean[:, None])
    b_g = _dot(b_zs.to(b_k.dtype), b_k, b_g)
    b_l = _dot(b_lower.to(b_k.dtype), b_k, b_l)
    return b_g, b_l, g_8 + tl.sum(_parts(b_zs), 1), l_8 + tl.sum(_parts(b_lower), 1)


@triton.jit(do_not_specialize=["T", "H", "n"])
def _query_gradient(
    p_q, p_k, p_v, p_o, p_do, p_dq, p_top, p_tau, p_delta, p_list, p_count, p_alpha, scale, T, H, n,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_ob, s_oh, s_ot, s_db, s_dh, s_dt,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dQ = scale * sum of u^(r-1) (dp - delta) k, where delta is the mean of dp weighted by u^(r-1).

    One visit of each tile: with the p-weighted mean, dO . O, for a first delta, both sums of k are gathered and
    combined when delta is known. A tile is visited in PARTS of its keys, which spares registers.
    """
    BN: tl.constexpr = TILE // PARTS
    i_bh, i_q = tl.program_id(0) // n, n - 1 - tl.program_id(0) % n
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_o += i_b * s_ob + i_h * s_oh
    p_do += i_b * s_db + i_h * s_dh
    p_dq += (i_b * T * 3 * H + i_h) * D  # of dqkv (B, T, 3, H, D), like dk and dv
    i_list = i_bh * n + i_q
    p_list += i_list.to(tl.int64) * n
    alpha, r, c = _parameters(p_alpha, scale, R)
    o_q = i_q * TILE + tl.arange(0, TILE)
    o_row = i_bh.to(tl.int64) * n * TILE + o_q
    tau = tl.load(p_tau + o_row)[:, None]
    top = tl.load(p_top + o_row)[:, None] if EXACT else 0.0
    b_q = _in_registers(_load_last(p_q, s_qt, i_q, T, D, BD, TILE), EXACT)
    b_zo = _in_registers(_load_last(p_do, s_dt, i_q, T, D, BD, TILE), EXACT)
    b_o = _load_last(p_o, s_ot, i_q, T, D, BD, TILE)
    mean = tl.sum(b_zo.to(tl.float32) * b_o.to(tl.float32), 1)
    b_g, b_l = tl.zeros([TILE, BD], tl.float32), tl.zeros([TILE, BD], tl.float32)
    g_8, l_8 = tl.zeros([TILE, 8], tl.float32), tl.zeros([TILE, 8], tl.float32)
    for part in tl.static_range(PARTS):
        b_g, b_l, g_8, l_8 = _query_visit(
            b_g, b_l, g_8, l_8, i_q * PARTS + part, b_q, b_zo, mean, top, tau, o_q, p_k, p_v, s_kt, s_vt, T, c, r,
            R, D, BD, BN, EXACT, True)  # fmt: skip
    for i in range(0, tl.load(p_count + i_list) * PARTS):
        j = tl.load(p_list + i // PARTS).to(tl.int32) * PARTS + i % PARTS
        b_g, b_l, g_8, l_8 = _query_visit(
            b_g, b_l, g_8, l_8, j, b_q, b_zo, mean, top, tau, o_q, p_k, p_v, s_kt, s_vt, T, c, r,
            R, D, BD, BN, EXACT, False)  # fmt: skip
    shift = tl.sum(g_8, 1) / tl.sum(l_8, 1)
    b_zq = scale * (b_g - shift[:, None] * b_l)
    b_zq = tl.where(o_q[:, None] == 0, b_zq * 0.0, b_zq)  # the row of one key: p is 1 whatever the score (or NaN)
    tl.store(p_delta + o_row, tl.where(o_q < T, mean + shift, 0.0))
    _store(p_dq, 3 * H * D, i_q, T, b_zq, D, BD, TILE)


@triton.jit
def _key_value_visit(
    b_zk, b_zv, i, b_k, b_v, o_k, p_q, p_do, p_top, p_tau, p_delta, s_qt, s_dt, T, c, r,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, EXACT: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Add the queries of block i to the sums of _key_value_gradient."""
    o_q = i * BM + tl.arange(0, BM)
    b_q = _load_last(p_q, s_qt, i, T, D, BD, BM)
    b_zo = _load_last(p_do, s_dt, i, T, D, BD, BM)
    tau = tl.load(p_tau + o_q)[None, :]
    top = tl.load(p_top + o_q)[None, :] if EXACT else 0.0
    b_z = _dot(b_k, tl.trans(b_q), None)  # [TILE, BM], the transpose of the scores
    b_zp = _dot(b_v, tl.trans(b_zo), None)
    if DIAGONAL:
        b_z = tl.where(o_q[None, :] >= o_k[:, None], b_z, -INFINITY)
    b_p, b_lower = _powers(_above(b_z, top, tau, c, EXACT), r, R)
    if not EXACT:
        b_p += tau * 0.0  # NaN where the row has NaN
    b_zv = _dot(b_p.to(b_zo.dtype), b_zo, b_zv)
    b_zs = b_lower * (b_zp - tl.load(p_delta + o_q)[None, :])
    if DIAGONAL:
        b_zs = tl.where(o_q[None, :] == 0, b_zs * 0.0, b_zs)  # the row of one key
    return _dot(b_zs.to(b_q.dtype), b_q, b_zk), b_zv


@triton.jit(do_not_specialize=["T", "H", "n"])
def _key_value_gradient(
    p_q, p_k, p_v, p_do, p_dk, p_dv, p_top, p_tau, p_delta, p_list, p_count, p_alpha, scale, T, H, n,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_db, s_dh, s_dt,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dK = scale * dS^T Q and dV = P^T dO, of one key block. A tile is visited in PARTS of its queries."""
    BM: tl.constexpr = TILE // PARTS
    i_bh, i_k = tl.program_id(0) // n, tl.program_id(0) % n
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_do += i_b * s_db + i_h * s_dh
    p_dk += (i_b * T * 3 * H + i_h) * D
    p_dv += (i_b * T * 3 * H + i_h) * D
    p_list += tl.program_id(0).to(tl.int64) * n
    p_top += i_bh.to(tl.int64) * n * TILE
    p_tau += i_bh.to(tl.int64) * n * TILE
    p_delta += i_bh.to(tl.int64) * n * TILE
    alpha, r, c = _parameters(p_alpha, scale, R)
    o_k = i_k * TILE + tl.arange(0, TILE)
    b_k = _in_registers(_load_last(p_k, s_kt, i_k, T, D, BD, TILE), EXACT)
    b_v = _in_registers(_load_last(p_v, s_vt, i_k, T, D, BD, TILE), EXACT)
    b_zk, b_zv = tl.zeros([TILE, BD], tl.float32), tl.zeros([TILE, BD], tl.float32)
    for part in tl.static_range(PARTS):
        b_zk, b_zv = _key_value_visit(
            b_zk, b_zv, i_k * PARTS + part, b_k, b_v, o_k, p_q, p_do, p_top, p_tau, p_delta, s_qt, s_dt, T, c, r,
            R, D, BD, BM, EXACT, True)  # fmt: skip
    for j in range(0, tl.load(p_count + tl.program_id(0)) * PARTS):
        i = tl.load(p_list + j // PARTS).to(tl.int32) * PARTS + j % PARTS
        b_zk, b_zv = _key_value_visit(
            b_zk, b_zv, i, b_k, b_v, o_k, p_q, p_do, p_top, p_tau, p_delta, s_qt, s_dt, T, c, r,
            R, D, BD, BM, EXACT, False)  # fmt: skip
    _store(p_dk, 3 * H * D, i_k, T, b_zk * scale, D, BD, TILE)
    _store(p_dv, 3 * H * D, i_k, T, b_zv, D, BD, TILE)


# -----------------------------------------------------------------------------
# launchers


# for 16 bits and D <= 64; the bounds on a thread's registers let more programs share a multiprocessor
FORWARD = {"num_stages": 3, "maxnreg": 128}
QUERY_GRADIENT = {"PARTS": 2, "num_stages": 3, "maxnreg": 168}
KEY_VALUE_GRADIENT = {"PARTS": 2, "num_stages": 3, "maxnreg": 168}


def _options(q, r):
    """The number of tiles along T, and for each kernel its launch options and what else is constant."""
    T, D = q.shape[2:]
    exact = q.dtype == torch.float32
    tile, num_stages = (32, 2 if D <= 64 else 1) if exact else (64, 2)
    common = dict(T=T, H=q.shape[1], n=triton.cdiv(T, tile), D=D, BD=max(16, triton.next_power_of_2(D)), TILE=tile)
    # 16 bits do without the accurate logarithm
    common |= dict(R=-1 if r == 0 and not exact else r, EXACT=exact)
    common |= dict(num_warps=4 if D <= 64 else 8, num_stages=num_stages)
    options = {}, {"PARTS": 1}, {"PARTS": 1}
    if not exact and D <= 64:
        options = FORWARD, QUERY_GRADIENT, KEY_VALUE_GRADIENT
    return common["n"], *(common | x for x in options)


def _strides(**tensors):
    return {f"s_{name}{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bht")}


def _readable(x):
    """x, copied if the elements of a row lie apart."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _saved(q):
    """Empty tensors for what the backward needs: of each row, to whole tiles, max z and tau, float32, or for 16 bits
    only c max z + tau; the map of tiles (B H, n, n), 1 where a tile has support."""
    BH, (n, options, *_) = q.shape[0] * q.shape[1], _options(q, 0)
    tau = q.new_empty(BH, n * options["TILE"], dtype=torch.float32)
    top = tau.new_empty(tau.shape if options["EXACT"] else (BH, 0))
    return top, tau, q.new_zeros(BH, n, n, dtype=torch.int8)


def unpacked(qkv):
    """q, k, v (B, H, T, D), views of qkv (B, T, 3, H, D)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: torch.Tensor | None, r: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v (B, H, T, D), D <= 128, float32 or 16 bits -> out, and what the backward needs (see _saved).

    alpha: one-element float32 tensor, or None and r = 1 / (alpha - 1), 1 or 2.
    """
    q, k, v = _readable(q), _readable(k), _readable(v)
    out, (top, tau, tile_map) = heads_last(q), _saved(q)
    n, options, *_ = _options(q, r)
    _forward[(q.shape[0] * q.shape[1] * n,)](
        p_q=q, p_k=k, p_v=v, p_o=out, p_top=top, p_tau=tau, p_list=torch.empty_like(tile_map, dtype=torch.int16),
        p_map=tile_map, p_alpha=alpha, scale=scale, **_strides(q=q, k=k, v=v), **options,
    )  # fmt: skip
    return out, top, tau, tile_map


# not called by the other operator, so that PyTorch's dispatcher is gone through once
entmax_kernels = operator("adasplash::entmax")(_attend)


@operator("adasplash::entmax_packed")
def entmax_kernels_packed(
    qkv: torch.Tensor, alpha: torch.Tensor | None, r: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same (see _attend) of qkv (B, T, 3, H, D), whose gradient is one tensor too."""
    return _attend(*unpacked(qkv), alpha, r, scale)


@operator("adasplash::entmax_backward")
def entmax_kernels_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, top: torch.Tensor,
    tau: torch.Tensor, tile_map: torch.Tensor, alpha: torch.Tensor | None, r: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """The gradients of q, k and v in one, (B, T, 3, H, D)."""
    dout, q, k, v, out = (_readable(x) for x in (dout, q, k, v, out))
    dqkv = _gradient_like(q)
    dq, dk, dv = unpacked(dqkv)
    n, _, for_queries, for_keys = _options(q, r)
    programs = (q.shape[0] * q.shape[1] * n,)
    shared = dict(p_q=q, p_k=k, p_v=v, p_do=dout, p_top=top, p_tau=tau, p_delta=torch.empty_like(tau), p_alpha=alpha)
    shared |= dict(scale=scale, **_strides(q=q, k=k, v=v, d=dout))
    lists = dict(p_list=torch.empty_like(tile_map, dtype=torch.int16))
    lists |= dict(p_count=tile_map.new_empty(programs, dtype=torch.int32))
    _lists[programs](p_map=tile_map, n=n, s_line=n, s_entry=1, BLOCK=128, num_warps=1, **lists)
    _query_gradient[programs](p_o=out, p_dq=dq, **_strides(o=out), **lists, **shared, **for_queries)
    _lists[programs](p_map=tile_map, n=n, s_line=1, s_entry=n, BLOCK=128, num_warps=1, **lists)
    _key_value_gradient[programs](p_dk=dk, p_dv=dv, **lists, **shared, **for_keys)
    return dqkv


def _gradient_like(q):
    B, H, T, D = q.shape
    return q.new_empty(B, T, 3, H, D)


@torch.library.register_fake("adasplash::entmax")
def _(q, k, v, alpha, r, scale):
    return heads_last(q), *_saved(q)


@torch.library.register_fake("adasplash::entmax_packed")
def _(qkv, alpha, r, scale):
    q, _, _ = unpacked(qkv)
    return heads_last(q), *_saved(q)


@torch.library.register_fake("adasplash::entmax_backward")
def _(dout, q, k, v, out, top, tau, tile_map, alpha, r, scale):
    return _gradient_like(q)


def _setup_context(ctx, inputs, output):
    *inputs, alpha, ctx.r, ctx.scale = inputs
    ctx.save_for_backward(*inputs, *output, alpha)


def _backward(ctx, dout, *_):
    *saved, alpha = ctx.saved_tensors
    return *unpacked(entmax_kernels_backward(dout, *saved, alpha, ctx.r, ctx.scale)), None, None, None


def _backward_packed(ctx, dout, *_):
    qkv, *saved, alpha = ctx.saved_tensors
    return entmax_kernels_backward(dout, *unpacked(qkv), *saved, alpha, ctx.r, ctx.scale), None, None, None


torch.library.register_autograd("adasplash::entmax", _backward, setup_context=_setup_context)
torch.library.register_autograd("adasplash::entmax_packed", _backward_packed, setup_context=_setup_context)
