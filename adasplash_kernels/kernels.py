"""Causal alpha-entmax attention in Triton: the paper's algorithms; scores are recomputed tile by tile, never stored.

For one row, z are its raw scores q.k, c = (alpha - 1) * scale, r = 1 / (alpha - 1), u = [c (z - max z) - tau]_+, and
its probabilities are p = u^r; docs/kernels.md says how tau is found. A tile is TILE queries by TILE keys. On the
diagonal some queries do not see some keys. A program takes the queries (or the keys) of one tile:

    forward    finds the row maxima and, on the way, a threshold that tau cannot be below and an estimate of tau; lists
               the tiles that exceed that threshold somewhere; sweeps over these until tau stands; adds up the output
               and marks on a map which groups of GROUP keys, and of GROUP queries, have support in which tile. Hopper
               GPUs have one of their own for 16 bits and D up to 64, in forward_hopper.py
    mend       does the queries again for which tau came out too low, which is rare (Hopper's forward does so itself)
    lists      turns the map into lists of key groups by query block, and of query groups by key block
    query_gradient, key_value_gradient      gather what is listed, from wherever it is, and the tile on the diagonal

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

from adasplash_kernels.reference import heads_last, operator, refuse_second_derivative

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
def _marks(p_8):
    """From sums [M, 8], without NaN, 1 where there is support: [M / 16, 8, 4] of a thread's own, for _word."""
    M: tl.constexpr = p_8.shape[0]
    return (tl.sum(tl.sum(tl.reshape(p_8, [M // 16, 2, 8, 4, 2]), 4), 1) > 0).to(tl.int32)


@triton.jit
def _word(bits):
    """All the bits in one integer."""
    return tl.reduce(tl.reduce(tl.reduce(bits, 2, _either), 1, _either), 0, _either)


@triton.jit
def _ones(word):
    """How many bits of an int32 are set: written so that LLVM makes it one instruction."""
    x = word.to(tl.uint32)
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _or(b_x, axis: tl.constexpr):
    """Of integers, along an axis: 0 if all are 0, else something else."""
    if INTERPRETED:
        return tl.max((b_x != 0).to(tl.int32), axis)
    else:
        return tl.reduce(b_x, axis, _either)


@triton.jit
def _together(bits, axis: tl.constexpr, GROUP: tl.constexpr):
    """The bits along an axis of 8 neighbours, which are bits of different groups unless these have more than 8."""
    if GROUP <= 8:
        return tl.sum(bits, axis)
    else:
        return tl.reduce(bits, axis, _either)


@triton.jit
def _union(bits, EXACT: tl.constexpr):
    """[M / 16, 8, 4] -> [M / 16], the bits that the threads of a warp have: with tensor cores, by one instruction."""
    if EXACT:  # elsewhere these are not neighbours, and Triton 3.6 would lose some
        return tl.reduce(tl.reduce(bits, 2, _either), 1, _either)
    else:
        return tl.reduce(tl.reshape(bits, [bits.shape[0], 32]), 1, _either)


@triton.jit
def _places(N: tl.constexpr):
    """What _support counts by in a tile of N columns.

    Rows i and i + 8, or a pair's two columns; the 4 pairs of 8 columns; the 8 rows i; the N / 8 parts of a row.
    """
    return tl.arange(0, 2), tl.arange(0, 4), tl.arange(0, 8), tl.arange(0, N // 8)


@triton.jit
def _support(b_p, p_8, places, GROUP: tl.constexpr, EXACT: tl.constexpr):
    """Which groups of keys, from bit 0 on, and of queries, from bit N / GROUP on, have support: a word for 16 rows.

    b_p [M, N] and p_8, its sums by _parts -> [M / 16]. NaN counts as support.
    """
    M: tl.constexpr = b_p.shape[0]
    N: tl.constexpr = b_p.shape[1]
    o_2, o_4, o_8, o_n = places
    # as the tensor cores leave it: a thread has rows i and i + 8 of 16, and of each a pair of columns in 8
    bits = tl.reshape(b_p.to(tl.int32, bitcast=True), [M // 16, 2, 8, N // 8, 4, 2])
    keys = (_or(_or(bits, 5), 1) != 0).to(tl.int32) << (o_n * 8 // GROUP)[None, None, :, None]
    keys = _together(keys, 2, GROUP) << (o_4 * 2 // GROUP)[None, None, :]
    bits = tl.reshape(p_8.to(tl.int32, bitcast=True), [M // 16, 2, 8, 4, 2])
    queries = (_or(bits, 4) != 0).to(tl.int32) << (o_2 * 8 // GROUP)[None, :, None, None]
    queries = _together(queries, 1, GROUP) << (o_8 // GROUP)[None, :, None]
    keys, queries = _union(keys, EXACT), _union(queries, EXACT)
    return keys.to(tl.uint32).to(tl.int64) | (queries.to(tl.int64) << N // GROUP)


@triton.jit
def _any_of_16(x):
    """[M] -> [M / 16], 1 where one of 16 neighbours is true."""
    return tl.max(tl.reshape(x.to(tl.int32), [x.shape[0] // 16, 16]), 1)


@triton.jit
def _store_words(p_words, words):
    """Each thread stores what it has, if others do so too: tl.store would first pass it on through shared memory."""
    if INTERPRETED:
        tl.store(p_words, words.to(p_words.dtype.element_ty))
    elif p_words.dtype.element_ty == tl.int64:
        tl.inline_asm_elementwise(
            "st.global.b64 [$1], $2; mov.b32 $0, 0;", "=r,l,l", [p_words.to(tl.int64), words], tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.inline_asm_elementwise(
            "st.global.b16 [$1], $2; mov.b32 $0, 0;", "=r,l,h", [p_words.to(tl.int64), words.to(tl.int16)], tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _dot(b_x, b_y, b_sum):
    if INTERPRETED:  # which takes bfloat16 for the integers that hold it
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, b_sum, input_precision="ieee")


@triton.jit
def _pointers(p_x, stride, i_block, BD: tl.constexpr, BLOCK: tl.constexpr):
    """To rows i_block * BLOCK.. of x (T, D), which lie stride apart: [BLOCK, BD]."""
    p_block = p_x + tl.cast(i_block, tl.int64) * (BLOCK * stride)
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
def _unscaled(total, lower, R: tl.constexpr, EXACT: tl.constexpr):
    """Sums of u^r and u^(r - 1) from those of what _above_any gives."""
    if R == 2 and not EXACT:
        return total * (LIMIT * LIMIT), lower * LIMIT
    elif R == 1 and not EXACT:
        return total * LIMIT, lower
    else:
        return total, lower


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
def _equal(n, alpha, R: tl.constexpr):
    """n^(1 - alpha)"""
    if R == 2:
        return tl.rsqrt(n)
    elif R == 1:
        return 1 / n
    else:
        return tl.exp2((1 - alpha) * tl.log2(n))


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
def _sums(b_z, b_y, top, tau, beyond, c, r, R: tl.constexpr, EXACT: tl.constexpr):
    """Of two tiles of the same rows: sum u^r and sum u^(r - 1), of 8 parts of a row.

    top and tau: [rows, 1], or a number; beyond: 0, or infinity for the second tile to be left out.
    """
    b_p, b_lower = _powers(_above(b_z, top, tau, c, EXACT), r, R)
    total_8, lower_8 = tl.sum(_parts(b_p), 1), tl.sum(_parts(b_lower), 1)
    b_p, b_lower = _powers(_above(b_y, top, tau + beyond, c, EXACT), r, R)
    return total_8 + tl.sum(_parts(b_p), 1), lower_8 + tl.sum(_parts(b_lower), 1)


@triton.jit
def _even(b_x):
    """Every other column, from those that a thread has."""
    return tl.split(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1] // 2, 2]))[0]


@triton.jit
def _first_tau(total, alpha, R: tl.constexpr):
    """Where to take the sums of the first keys, given S / 2, sum u^r at -1 of half of them.

    tau is -1 where the largest key has it all, and -S^(1 - alpha) where S keys are as large. 0.6 of the way between is
    near the root, with trained, Gaussian and nearly equal scores alike.
    """
    return -1 + 0.6 * (1 - _equal(tl.maximum(2 * total, 1.0), alpha, R))


@triton.jit
def _moved(tau, step, furthest, EXACT: tl.constexpr):
    """What to multiply tau by for Newton's step, `furthest` at most, so that it stays below 0, and is -1 or above."""
    inverse = _inverse(tau, EXACT)
    f = 1 + step * inverse + 1e-6  # which is for rounding
    return tl.maximum(tl.minimum(f, tl.minimum(-inverse, furthest)), 1e-6)


@triton.jit
def _rise_first(tau, total, lower, N: tl.constexpr, alpha, r, R: tl.constexpr, EXACT: tl.constexpr):
    """_rise for the first keys, N or fewer: the floor that follows from their sums at tau, on either side of it."""
    f = _moved(tau, _newton(total, lower, alpha, R, EXACT)[1], INFINITY, EXACT)
    most = lower * _power(tl.minimum(f, 1.0), r, R)
    if R == 2:  # back from there, any of them may have a u that is larger by the step
        most += N * tl.maximum(tau - tau * f, 0.0)
    elif R == 1:
        most = tl.where(f > 1, 1.0 * N, most)
    total, lower = _shrink(total, lower, -tau, -tau * f, r, R, EXACT)
    return tau * f, most, tl.maximum(total, 1.0), tl.maximum(lower, 1.0)


@triton.jit
def _rise(
    top, floor, most, total, lower, new_top, new_total, new_lower, c, alpha, r,
    R: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Raise the floor under tau, given the maximum of some more keys and, at the present floor, their sums.

    Of the keys before, 1 <= sum u^r and most >= sum u^(r - 1). Newton's step from below the root does not pass it,
    nor does it with such bounds for the sums. total and lower, estimates of the sums, follow.
    """
    both = _larger(top, new_top)
    new_floor = floor - (both - top) * c
    far = new_floor < -LIMIT  # maxima far above what was: u may have saturated
    _, step = _newton(1 + new_total, most + new_lower, alpha, R, EXACT)
    f = _moved(new_floor, tl.where(far, 0.0, step), 1.0, EXACT)
    old_f = tl.maximum(1 - new_floor * _inverse(floor, EXACT) * (1 - f), 1e-6)
    # each u, at most the distance to the maximum, shrinks by f or more; from far away to 1 or less, of up to 1e6 keys
    most = most * _power(old_f, r, R) + tl.where(far, 1e6, new_lower * _power(f, r, R))
    new_floor *= f
    total, lower = _shrink(total, lower, -floor, (top - both) * c - new_floor, r, R, EXACT)
    new_total, new_lower = _shrink(
        new_total, new_lower, (new_top - top) * c - floor, (new_top - both) * c - new_floor, r, R, EXACT
    )
    return both, new_floor, most, tl.maximum(total + new_total, 1.0), tl.maximum(lower + new_lower, 1.0)


@triton.jit
def _bounds(floor, o_q, T, alpha, R: tl.constexpr):
    """Below and above tau; infinity for rows beyond T, which then have no support."""
    ceiling = -_equal((o_q + 1).to(tl.float32), alpha, R)  # equal scores have tau here, others below
    return tl.where(o_q < T, floor, INFINITY), tl.where(o_q < T, ceiling, INFINITY)


@triton.constexpr_function
def _tolerance(dtype):
    """Of 16 bits, see docs/kernels.md."""
    return 0.06 if dtype == tl.float16 else 0.24


@triton.jit
def _next_tau(
    tau, total, lower, floor, ceiling, go, tolerance: tl.constexpr, alpha, r, R: tl.constexpr, EXACT: tl.constexpr
):
    """What follows from the sums of sweep `go` at tau: the next tau, and whether it is to be swept at."""
    h, step = _newton(total, lower, alpha, R, EXACT)
    if EXACT:
        unsettled = tl.abs(h) > 1e-6
    else:  # the step from here leaves, as a rule, less than the rounding of p to 16 bits
        bound = tl.minimum(tolerance * (alpha - 1), tolerance / 2)
        m = _exponent(tau, total, lower, 1.0, EXACT)  # from below the root it leaves about (1 - 1 / m) h^2
        unsettled = h * h * tl.where(h > 0, 2 - 2 * _inverse(m, EXACT), 1.0) > bound * bound
    new_tau = tau + step
    if go <= 2:  # the guess lands nearer to the root, on either side
        new_tau = tl.where(unsettled, tl.maximum(new_tau, _guess(tau, total, lower, r, R, EXACT)), new_tau)
    return tl.minimum(tl.maximum(new_tau, floor), ceiling), unsettled


@triton.jit(do_not_specialize=["T", "H", "n"])
def _forward(
    p_q, p_k, p_v, p_o, p_top, p_shift, p_list, p_map, p_alpha, scale, T, H, n, s_b, s_h, s_t: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    i_q = n - 1 - tl.program_id(0)  # the longest rows first
    i_b, i_h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_bh = i_b * H + i_h
    p_q += i_b * s_b + i_h * s_h
    p_k += i_b * s_b + i_h * s_h
    p_v += i_b * s_b + i_h * s_h
    p_o += (i_b * T * H + i_h) * D
    p_list += (i_bh * n + i_q) * n
    p_map += (i_bh * n + i_q) * n * (TILE // 16)
    alpha, r, c = _parameters(p_alpha, scale, R)
    o_q = i_q * TILE + tl.arange(0, TILE)
    o_32 = tl.arange(0, 32)
    b_q = _load_last(p_q, s_t, i_q, T, D, BD, TILE)
    for start in range(0, n * (TILE // 16), 128):  # nothing has support until it is found
        o = start + tl.arange(0, 128)
        tl.store(p_map + o, tl.zeros([128], p_map.dtype.element_ty), mask=o < n * (TILE // 16))

    # The tile on the diagonal and the one before it come first, since near keys are often the largest
    zero, zero_8 = tl.zeros([TILE], tl.float32), tl.zeros([TILE, 8], tl.float32)
    b_y = _dot(b_q, tl.trans(_load_last(p_k, s_t, i_q - 1, tl.where(i_q > 0, T, -TILE), D, BD, TILE)), None)
    b_z = _causal(_dot(b_q, tl.trans(_load_last(p_k, s_t, i_q, T, D, BD, TILE)), None), o_q, i_q)
    near = tl.where(i_q > 0, _max(b_y), -INFINITY)  # the first has none before it
    top, tau = _larger(_max(b_z), near), zero - 1
    beyond = tl.where(i_q > 0, 0.0, INFINITY)
    if R > 0:  # where that costs less than it saves later
        total_8, _ = _sums(_even(b_z), _even(b_y), top[:, None], tau[:, None], beyond, c, r, R, EXACT)
        tau = _first_tau(tl.sum(total_8, 1), alpha, R)
    total_8, lower_8 = _sums(b_z, b_y, top[:, None], tau[:, None], beyond, c, r, R, EXACT)
    total, lower = tl.sum(total_8, 1), tl.sum(lower_8, 1)
    floor, most, total, lower = _rise_first(tau, total, lower, 2 * TILE, alpha, r, R, EXACT)

    # Then all others, backwards: the row maxima, and the list of the tiles that exceed the floor somewhere
    n_list = tl.max((((near - top) * c >= floor) & (o_q < T)).to(tl.int32), 0)
    tl.store(p_list, (i_q - 1).to(tl.int16), mask=n_list > 0)
    for done in range(1, i_q, 32):  # 32 tiles: a bit of an int a tile, so that warps need not meet at each tile
        bits = tl.zeros([TILE // 16, 8, 4], tl.int32)
        # sums and maxima stay in 8 parts of a row, which takes no exchange between threads, until they are used
        top_8, total_8, lower_8 = zero_8 - INFINITY, zero_8, zero_8
        for i in range(0, tl.minimum(i_q - done, 32)):
            b_z = _dot(b_q, tl.trans(_load(p_k, s_t, i_q - 1 - done - i, D, BD, TILE)), None)
            top_8 = _larger(top_8, _max(_parts(b_z)))
            b_u = _above_any(b_z, top[:, None], tl.where(o_q < T, floor, INFINITY)[:, None], c, R, EXACT)
            b_p, b_lower = _powers(b_u, r, R)
            p_8 = tl.sum(_parts(b_p), 1)
            total_8, lower_8 = total_8 + p_8, lower_8 + tl.sum(_parts(b_lower), 1)
            if EXACT or R <= 0:  # where the maximum is NaN, so are the sums, and only that row is to be passed over
                p_8 = tl.where(p_8 > 0, 1.0, 0.0)
            bits |= _marks(p_8) << i
        new_total, new_lower = _unscaled(tl.sum(total_8, 1), tl.sum(lower_8, 1), R, EXACT)
        top, floor, most, total, lower = _rise(
            top, floor, most, total, lower, _max(top_8), new_total, new_lower, c, alpha, r, R, EXACT
        )
        word = _word(bits)
        p_place = p_list + (n_list + _ones(word & ((1 << o_32) - 1)))
        tl.store(p_place, (i_q - 1 - done - o_32).to(tl.int16), mask=(word >> o_32 & 1) > 0)
        n_list += _ones(word)
    tl.debug_barrier()  # the list is read by all from here

    # Sweeps over the listed tiles and the diagonal, until tau stands. Rows beyond T have none, and are not waited for
    floor, ceiling = _bounds(floor, o_q, T, alpha, R)
    tau = tl.maximum(tl.minimum(_guess(floor, total, lower, r, R, EXACT), ceiling), floor)
    tolerance: tl.constexpr = _tolerance(p_q.dtype.element_ty)
    go = 1
    while go > 0:
        total_8, lower_8 = zero_8, zero_8
        for i in range(0, n_list):
            j = tl.load(p_list + i).to(tl.int32)
            b_z = _dot(b_q, tl.trans(_load(p_k, s_t, j, D, BD, TILE)), None)
            b_p, b_lower = _powers(_above(b_z, top[:, None], tau[:, None], c, EXACT), r, R)
            total_8, lower_8 = total_8 + tl.sum(_parts(b_p), 1), lower_8 + tl.sum(_parts(b_lower), 1)
        b_z = _causal(_dot(b_q, tl.trans(_load_last(p_k, s_t, i_q, T, D, BD, TILE)), None), o_q, i_q)
        b_p, b_lower = _powers(_above(b_z, top[:, None], tau[:, None], c, EXACT), r, R)
        total = tl.sum(total_8 + tl.sum(_parts(b_p), 1), 1)
        lower = tl.sum(lower_8 + tl.sum(_parts(b_lower), 1), 1)
        new_tau, unsettled = _next_tau(tau, total, lower, floor, ceiling, go, tolerance, alpha, r, R, EXACT)
        moving = unsettled & (new_tau != tau) & (o_q < T)  # a row with NaN has none, or a tau that stands
        tau = new_tau
        go = tl.where(go < MAX_SWEEPS, go + 1, 0) * tl.max(moving.to(tl.int32), 0)

    # The output, and which groups of keys and queries have support
    nan = _any_of_16((top != top) & (o_q < T))  # has support, though u be 0
    p_words = p_map + tl.arange(0, TILE // 16)
    total_8, b_o = zero_8, tl.zeros([TILE, BD], tl.float32)
    for done in range(0, n_list, 32):  # in parts, since Triton 3.6 then takes less shared memory
        for i in range(done, tl.minimum(done + 32, n_list)):
            j = tl.load(p_list + i).to(tl.int32)
            b_z = _dot(b_q, tl.trans(_load(p_k, s_t, j, D, BD, TILE)), None)
            b_p = _powers(_above(b_z, top[:, None], tau[:, None], c, EXACT), r, R)[0]
            b_v = _load(p_v, s_t, j, D, BD, TILE)
            b_o = _dot(b_p.to(b_v.dtype), b_v, b_o)
            p_8 = tl.sum(_parts(b_p), 1)
            total_8 += p_8
            _store_words(p_words + j * (TILE // 16), _support(b_p, p_8, _places(TILE), GROUP, EXACT) | -nan)
    b_z = _causal(_dot(b_q, tl.trans(_load_last(p_k, s_t, i_q, T, D, BD, TILE)), None), o_q, i_q)
    b_p = _powers(_above(b_z, top[:, None], tau[:, None], c, EXACT), r, R)[0]
    b_v = _load_last(p_v, s_t, i_q, T, D, BD, TILE)
    b_o = _dot(b_p.to(b_v.dtype), b_v, b_o)

    total = tl.sum(total_8 + tl.sum(_parts(b_p), 1), 1)
    _, step = _newton(total, lower, alpha, R, EXACT)  # lower is the last sweep's: nearly the same
    if not EXACT:  # the last step may have let in many keys from just below tau: for _mend, by the diagonal's word
        _store_words(p_words + i_q * (TILE // 16), _any_of_16((total > 1 + tolerance / 8) & (o_q < T)).to(tl.int64))
    tau = tl.minimum(tl.maximum(tau + step, floor), ceiling)
    o_row = i_bh * n * TILE + o_q
    if EXACT:
        tl.store(p_top + o_row, top)
    else:
        tau += top * c
    tl.store(p_shift + o_row, tl.where(o_q < T, -tau, -1e30))  # p is 0 beyond T
    _store(p_o, H * D, i_q, T, b_o * (1 / total)[:, None], D, BD, TILE)


@triton.jit(do_not_specialize=["heads", "T", "H", "n"])
def _mend(
    p_q, p_k, p_v, p_o, p_shift, p_map, p_alpha, scale, heads, T, H, n, s_b, s_h, s_t,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Once more those blocks of queries that _forward has marked, by Newton's steps from where it ended.

    A program has 128 blocks to look after, the last one fewer: of `heads` heads, n each.
    """
    alpha, r, c = _parameters(p_alpha, scale, R)
    o_block = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    p_own = p_map + (o_block * n + o_block % n)[:, None] * (TILE // 16) + tl.arange(0, TILE // 16)[None, :]
    marked = _or(tl.load(p_own, mask=(o_block < heads * n)[:, None], other=0), 1) != 0
    while tl.max(marked.to(tl.int32), 0) > 0:
        block = tl.min(tl.where(marked, o_block, heads.to(tl.int64) * n), 0)
        marked = marked & (o_block != block)
        i_b, i_h, i_q = block // n // H, block // n % H, (block % n).to(tl.int32)
        p_qi, p_ki, p_vi = p_q + i_b * s_b + i_h * s_h, p_k + i_b * s_b + i_h * s_h, p_v + i_b * s_b + i_h * s_h
        p_row = p_shift + block * TILE + tl.arange(0, TILE)
        o_q = i_q * TILE + tl.arange(0, TILE)
        b_q = _load_last(p_qi, s_t, i_q, T, D, BD, TILE)
        shift, go = tl.load(p_row), 1
        while go > 0:
            total, lower = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
            for j in range(0, i_q + 1):
                b_z = _causal(_dot(b_q, tl.trans(_load_last(p_ki, s_t, j, T, D, BD, TILE)), None), o_q, j)
                b_p, b_lower = _powers(_saturated(b_z, c, shift[:, None]), r, R)
                total, lower = total + tl.sum(b_p, 1), lower + tl.sum(b_lower, 1)
            _, step = _newton(total, lower, alpha, R, EXACT)
            moving = (tl.abs(total - 1) > 2e-4) & (shift - step != shift) & (total > 0) & (o_q < T)
            shift = tl.where(moving, shift - step, shift)
            go = tl.where(go < MAX_SWEEPS, go + 1, 0) * tl.max(moving.to(tl.int32), 0)
        tl.store(p_row, shift)
        nan = tl.max((shift != shift).to(tl.int32), 0)
        p_words = p_map + block * n * (TILE // 16) + tl.arange(0, TILE // 16)
        total, b_o = tl.zeros([TILE], tl.float32), tl.zeros([TILE, BD], tl.float32)
        for j in range(0, i_q + 1):
            b_z = _causal(_dot(b_q, tl.trans(_load_last(p_ki, s_t, j, T, D, BD, TILE)), None), o_q, j)
            b_p = _powers(_saturated(b_z, c, shift[:, None]), r, R)[0]
            b_v = _load_last(p_vi, s_t, j, T, D, BD, TILE)
            b_o = _dot(b_p.to(b_v.dtype), b_v, b_o)
            p_8 = tl.sum(_parts(b_p), 1)
            total += tl.sum(p_8, 1)
            _store_words(p_words + j * (TILE // 16), _support(b_p, p_8, _places(TILE), GROUP, EXACT) | -nan)
        _store(p_o + (i_b * T * H + i_h) * D, H * D, i_q, T, b_o * (1 / total)[:, None], D, BD, TILE)


# -----------------------------------------------------------------------------
# backward


@triton.jit
def _flags(p_map, start, last, s_tile, of_queries, WORDS: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr):
    """Of TILES tiles from `start` on, before `last`: 1 for each of the GROUPS of a tile that has support."""
    o_i, o_word = start + tl.arange(0, TILES), tl.arange(0, WORDS)
    p_words = p_map + (tl.cast(o_i, tl.int64) * s_tile * WORDS)[:, None] + o_word[None, :]
    words = tl.load(p_words, mask=(o_i < last)[:, None], other=0).to(tl.int64)
    if of_queries:  # a word has those of 16
        words = (words >> GROUPS & ((1 << GROUPS // WORDS) - 1)) << (o_word * (GROUPS // WORDS))[None, :]
    words = tl.reduce(words.to(tl.int32), 1, _either)
    return tl.reshape(words[:, None] >> tl.arange(0, GROUPS)[None, :], [TILES * GROUPS]) & 1


@triton.jit(do_not_specialize=["n"])
def _lists(p_map, p_list, p_count, n, WORDS: tl.constexpr, GROUPS: tl.constexpr):
    """Ascending, the groups that have support: of keys in a row of the map, before the diagonal; or where the second
    index of the program is 1 of queries in a column, after it.

    A tile has GROUPS of either, as bits in WORDS words (see _support). What visits a list takes some groups at a time:
    to fill these up, the list goes on with groups that have no support, each once, as if their tile were visited whole.
    """
    TILES: tl.constexpr = 256 // GROUPS
    i_bh, i_line = (tl.program_id(0) // n).to(tl.int64), tl.program_id(0) % n
    of_queries = tl.program_id(1) > 0
    i_list = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    s_line, s_tile = tl.where(of_queries, 1, n), tl.where(of_queries, n, 1)
    p_map += (i_bh * n * n + i_line.to(tl.int64) * s_line) * WORDS
    p_list += i_list.to(tl.int64) * n * GROUPS
    first, last = tl.where(of_queries, i_line + 1, 0), tl.where(of_queries, n, i_line)
    n_list = 0
    for start in range(first, last, TILES):
        flags = _flags(p_map, start, last, s_tile, of_queries, WORDS, GROUPS, TILES)
        groups = start * GROUPS + tl.arange(0, TILES * GROUPS)
        tl.store(p_list + n_list + tl.cumsum(flags, 0) - flags, groups.to(tl.int16), mask=flags > 0)
        n_list += tl.sum(flags, 0)
    n_all, n_full, start = n_list, tl.cdiv(n_list, GROUPS) * GROUPS, first
    while (n_all < n_full) & (start < last):
        groups = start * GROUPS + tl.arange(0, GROUPS)
        flags = 1 - _flags(p_map, start, last, s_tile, of_queries, WORDS, GROUPS, 1)
        o = n_all + tl.cumsum(flags, 0) - flags
        tl.store(p_list + o, groups.to(tl.int16), mask=(flags > 0) & (o < n_full))
        n_all, start = n_all + tl.sum(flags, 0), start + 1
    tl.store(p_count + i_list, n_list)


@triton.jit
def _members(groups, GROUP: tl.constexpr):
    """The positions in T of groups of GROUP."""
    o = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return tl.reshape(o, [groups.shape[0] * GROUP])


@triton.jit
def _gather(p_x, stride, o, T, D: tl.constexpr, BD: tl.constexpr):
    """Rows o of x (T, D), which lie stride apart; zero for those beyond T."""
    o = o.to(tl.uint32)[:, None]
    mask = (o < T) & (tl.arange(0, BD)[None, :] < D)
    return tl.load(p_x + (o * stride + tl.arange(0, BD)[None, :]), mask=mask, other=0.0)


@triton.jit
def _above_saved(b_z, top, shift, c, EXACT: tl.constexpr):
    """u from what _saved says of a row."""
    if EXACT:
        return tl.maximum((b_z - top) * c + shift, 0.0, propagate_nan=NAN)
    else:
        return _saturated(b_z, c, shift)


@triton.jit
def _query_visit(
    b_g, b_l, g_8, l_8, o_k, b_k, b_v, b_q, b_zo, less_mean, top, shift, o_q, c, r,
    R: tl.constexpr, EXACT: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Add keys to the sums of _query_gradient."""
    b_z = _dot(b_q, tl.trans(b_k), None)  # [TILE, BLOCK]
    b_zp = _dot(b_zo, tl.trans(b_v), None)
    if DIAGONAL:
        b_z = tl.where(o_q[:, None] >= o_k[None, :], b_z, -INFINITY)
    _, b_lower = _powers(_above_saved(b_z, top, shift, c, EXACT), r, R)  # p^(2 - alpha)
    b_zs = b_lower * (b_zp + less_mean[:, None])
    b_g = _dot(b_zs.to(b_k.dtype), b_k, b_g)
    b_l = _dot(b_lower.to(b_k.dtype), b_k, b_l)
    return b_g, b_l, g_8 + tl.sum(_parts(b_zs), 1), l_8 + tl.sum(_parts(b_lower), 1)


@triton.jit(do_not_specialize=["T", "H", "n"])
def _query_gradient(
    p_q, p_k, p_v, p_o, p_do, p_dq, p_top, p_shift, p_rows, p_list, p_count, p_alpha, scale, T, H, n,
    s_b, s_h, s_t: tl.constexpr, s_ob, s_oh, s_ot: tl.constexpr, s_db, s_dh, s_dt: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """dQ = scale * sum of u^(r-1) (dp - delta) k, where delta is the mean of dp weighted by u^(r-1).

    One visit of each key: with the p-weighted mean, dO . O, for a first delta, both sums of k are gathered and
    combined when delta is known. BLOCK keys are visited together. For _key_value_gradient it leaves p_rows, (rows, 2):
    shift, which is -tau or what stands for it (see _saved), and -delta.
    """
    # backwards: the next kernel begins with what is still cached
    i_q = n - 1 - tl.program_id(0)
    i_h, i_b = H - 1 - tl.program_id(1).to(tl.int64), tl.num_programs(2) - 1 - tl.program_id(2).to(tl.int64)
    i_bh = i_b * H + i_h
    p_q += i_b * s_b + i_h * s_h
    p_k += i_b * s_b + i_h * s_h
    p_v += i_b * s_b + i_h * s_h
    p_o += i_b * s_ob + i_h * s_oh
    p_do += i_b * s_db + i_h * s_dh
    p_dq += (i_b * T * 3 * H + i_h) * D  # of dqkv (B, T, 3, H, D), like dk and dv
    i_list = i_bh * n + i_q
    p_list += i_list * n * (TILE // GROUP)
    alpha, r, c = _parameters(p_alpha, scale, R)
    o_q = i_q * TILE + tl.arange(0, TILE)
    o_row = i_bh * n * TILE + o_q
    shift = tl.load(p_shift + o_row)
    top = tl.load(p_top + o_row)[:, None] if EXACT else 0.0
    b_q = _load_last(p_q, s_t, i_q, T, D, BD, TILE)  # all loads first
    b_zo = _load_last(p_do, s_dt, i_q, T, D, BD, TILE)
    b_o = _load_last(p_o, s_ot, i_q, T, D, BD, TILE)
    b_k = _load_last(p_k, s_t, i_q, T, D, BD, TILE)
    b_v = _load_last(p_v, s_t, i_q, T, D, BD, TILE)
    n_list = tl.load(p_count + i_list)
    b_q, b_zo = _in_registers(b_q, EXACT), _in_registers(b_zo, EXACT)
    less_mean = -tl.sum(b_zo.to(tl.float32) * b_o.to(tl.float32), 1)
    b_g, b_l = tl.zeros([TILE, BD], tl.float32), tl.zeros([TILE, BD], tl.float32)
    g_8, l_8 = tl.zeros([TILE, 8], tl.float32), tl.zeros([TILE, 8], tl.float32)
    b_g, b_l, g_8, l_8 = _query_visit(
        b_g, b_l, g_8, l_8, o_q, b_k, b_v, b_q, b_zo, less_mean, top, shift[:, None], o_q, c, r, R, EXACT, True
    )
    # where all keys have support, their list is not read: this program would wait for it
    n_read = tl.where(n_list < i_q * (TILE // GROUP), n * (TILE // GROUP), 0)
    for i in range(0, tl.cdiv(n_list * GROUP, BLOCK)):
        o_group = i * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        groups = tl.load(p_list + o_group, mask=o_group < n_read, other=0).to(tl.int32)
        o_k = _members(tl.where(o_group < n_read, groups, o_group), GROUP)
        b_g, b_l, g_8, l_8 = _query_visit(
            b_g, b_l, g_8, l_8, o_k, _gather(p_k, s_t, o_k, T, D, BD), _gather(p_v, s_t, o_k, T, D, BD), b_q, b_zo,
            less_mean, top, shift[:, None], o_q, c, r, R, EXACT, False)  # fmt: skip
    move = tl.sum(g_8, 1) / tl.sum(l_8, 1)
    row_scale = tl.where(o_q == 0, 0.0, scale)  # the row of one key: p is 1 whatever the score (or NaN)
    b_zq = row_scale[:, None] * (b_g - move[:, None] * b_l)
    tl.store(p_rows + 2 * o_row, shift)
    tl.store(p_rows + 2 * o_row + 1, tl.where(o_q < T, less_mean - move, 0.0))
    _store(p_dq, 3 * H * D, i_q, T, b_zq, D, BD, TILE)


@triton.jit
def _key_value_visit(
    b_zk, b_zv, o_q, b_q, b_zo, rows, top, b_k, b_v, o_k, c, r,
    R: tl.constexpr, EXACT: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Add queries to the sums of _key_value_gradient."""
    shift, less_delta = tl.split(tl.reshape(rows, [o_q.shape[0], 2]))
    b_z = _dot(b_k, tl.trans(b_q), None)  # [TILE, BLOCK], the transpose of the scores
    b_zp = _dot(b_v, tl.trans(b_zo), None)
    if DIAGONAL:
        b_z = tl.where(o_q[None, :] >= o_k[:, None], b_z, -INFINITY)
    b_p, b_lower = _powers(_above_saved(b_z, top, shift[None, :], c, EXACT), r, R)
    b_zv = _dot(b_p.to(b_zo.dtype), b_zo, b_zv)
    b_zs = b_lower * (b_zp + less_delta[None, :])
    if DIAGONAL:
        b_zs = tl.where(o_q[None, :] == 0, b_zs * 0.0, b_zs)  # the row of one key
    return _dot(b_zs.to(b_q.dtype), b_q, b_zk), b_zv


@triton.jit(do_not_specialize=["T", "H", "n"])
def _key_value_gradient(
    p_q, p_k, p_v, p_do, p_dk, p_dv, p_top, p_rows, p_list, p_count, p_alpha, scale, T, H, n,
    s_b, s_h, s_t: tl.constexpr, s_db, s_dh, s_dt: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """dK = scale * dS^T Q and dV = P^T dO, of one key block. BLOCK queries are visited together."""
    i_k = tl.program_id(0)
    i_b, i_h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    i_bh = i_b * H + i_h
    p_q += i_b * s_b + i_h * s_h
    p_k += i_b * s_b + i_h * s_h
    p_v += i_b * s_b + i_h * s_h
    p_do += i_b * s_db + i_h * s_dh
    p_dk += (i_b * T * 3 * H + i_h) * D
    p_dv += (i_b * T * 3 * H + i_h) * D
    i_list = (tl.num_programs(2) * H + i_bh) * n + i_k  # the lists of queries come after those of keys
    p_list += i_list * n * (TILE // GROUP)
    p_top += i_bh * n * TILE
    p_rows += i_bh * n * TILE * 2
    alpha, r, c = _parameters(p_alpha, scale, R)
    o_k = i_k * TILE + tl.arange(0, TILE)
    b_k = _load_last(p_k, s_t, i_k, T, D, BD, TILE)  # all loads first
    b_v = _load_last(p_v, s_t, i_k, T, D, BD, TILE)
    b_q = _load_last(p_q, s_t, i_k, T, D, BD, TILE)
    b_zo = _load_last(p_do, s_dt, i_k, T, D, BD, TILE)
    rows = tl.load(p_rows + 2 * i_k * TILE + tl.arange(0, 2 * TILE))
    top = tl.load(p_top + o_k)[None, :] if EXACT else 0.0
    n_list = tl.load(p_count + i_list)
    b_k, b_v = _in_registers(b_k, EXACT), _in_registers(b_v, EXACT)
    b_zk, b_zv = tl.zeros([TILE, BD], tl.float32), tl.zeros([TILE, BD], tl.float32)
    b_zk, b_zv = _key_value_visit(b_zk, b_zv, o_k, b_q, b_zo, rows, top, b_k, b_v, o_k, c, r, R, EXACT, True)
    if n_list == (n - 1 - i_k) * (TILE // GROUP):  # all that there are, for which no list is read
        for i in range((i_k + 1) * (TILE // BLOCK), n * (TILE // BLOCK)):
            o_i = i * BLOCK + tl.arange(0, BLOCK)
            b_zk, b_zv = _key_value_visit(
                b_zk, b_zv, o_i, _load_last(p_q, s_t, i, T, D, BD, BLOCK), _load_last(p_do, s_dt, i, T, D, BD, BLOCK),
                tl.load(p_rows + i * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)),
                tl.load(p_top + o_i)[None, :] if EXACT else 0.0, b_k, b_v, o_k, c, r, R, EXACT, False)  # fmt: skip
    else:
        for i in range(0, tl.cdiv(n_list * GROUP, BLOCK)):
            queries = tl.load(p_list + i * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)).to(tl.int32)
            o_q = _members(queries, GROUP)
            b_zk, b_zv = _key_value_visit(
                b_zk, b_zv, o_q, _gather(p_q, s_t, o_q, T, D, BD), _gather(p_do, s_dt, o_q, T, D, BD),
                tl.load(p_rows + (queries[:, None] * (2 * GROUP) + tl.arange(0, 2 * GROUP)[None, :])),
                tl.load(p_top + o_q)[None, :] if EXACT else 0.0, b_k, b_v, o_k, c, r, R, EXACT, False)  # fmt: skip
    if not EXACT:
        b_zv += b_zk * 0.0  # the u of a row with NaN are 0, so that it makes dK NaN alone
    _store(p_dk, 3 * H * D, i_k, T, b_zk * scale, D, BD, TILE)
    _store(p_dv, 3 * H * D, i_k, T, b_zv, D, BD, TILE)


# -----------------------------------------------------------------------------
# launchers


# keys or queries in a group -> the longest T: in small groups less is visited in vain, but the lists are long
LONGEST = {2: 1 << 13, 8: 1 << 18, 16: 1 << 19}
# for 16 bits and D <= 64; the bounds on a thread's registers let more programs share a multiprocessor
FORWARD = {"num_stages": 3, "maxnreg": 128}
QUERY_GRADIENT = {"BLOCK": 32, "num_stages": 3, "maxnreg": 168}
KEY_VALUE_GRADIENT = {"BLOCK": 32, "num_stages": 3, "maxnreg": 168}


def _options(q, r):
    """The number of tiles along T, and for each kernel its launch options and what else is constant."""
    T, D = q.shape[2:]
    exact = q.dtype == torch.float32
    tile, num_stages = (32, 2 if D <= 64 else 1) if exact else (64, 2)
    common = dict(T=T, H=q.shape[1], n=triton.cdiv(T, tile), D=D, BD=max(16, triton.next_power_of_2(D)), TILE=tile)
    common |= dict(GROUP=next(group for group, longest in LONGEST.items() if T <= longest))
    # 16 bits do without the accurate logarithm
    common |= dict(R=-1 if r == 0 and not exact else r, EXACT=exact)
    common |= dict(num_warps=4 if D <= 64 else 8, num_stages=num_stages)
    options = {}, {"BLOCK": tile}, {"BLOCK": tile}
    if not exact and D <= 64:
        options = FORWARD, QUERY_GRADIENT, KEY_VALUE_GRADIENT
    return common["n"], *(common | x for x in options)


def _strides(x, name=""):
    return {f"s_{name}{axis}": x.stride(i) for i, axis in enumerate("bht")}


def _readable(*tensors):
    """The tensors, copied unless all have the same strides, the elements of a row together, and 31 bits reach them."""
    strides = [x.stride() for x in tensors]
    near = all(x == strides[0] and x[3] == 1 for x in strides) and tensors[0].shape[2] * strides[0][2] < 2**31
    return tensors if near else [x.contiguous() for x in tensors]


def _saved(q):
    """Empty tensors for what the backward needs: of each row, to whole tiles, max z and -tau, float32, or for 16 bits
    only -(c max z + tau); the map of tiles (B H, n, n, TILE / 16), words of bits (see _support), of which the backward
    does not read the diagonal's; there kernels.py's _forward tells _mend which blocks of queries are to be done again.
    """
    BH, (n, options, *_) = q.shape[0] * q.shape[1], _options(q, 0)
    shift = q.new_empty(BH, n * options["TILE"], dtype=torch.float32)
    top = shift.new_empty(shift.shape if options["EXACT"] else (BH, 0))
    # bits for a tile's groups of keys and those of 16 queries
    word = torch.int64 if options["TILE"] + 16 > 16 * options["GROUP"] else torch.int16
    return top, shift, q.new_empty(BH, n, n, options["TILE"] // 16, dtype=word)


def unpacked(qkv):
    """q, k, v (B, H, T, D), views of qkv (B, T, 3, H, D)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: torch.Tensor | None, r: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v (B, H, T, D), D <= 128, float32 or 16 bits -> out, and what the backward needs (see _saved).

    alpha: one-element float32 tensor, or None and r = 1 / (alpha - 1), 1 or 2.
    """
    q, k, v = _readable(q, k, v)
    out, (top, shift, tile_map) = heads_last(q), _saved(q)
    n, options, *_ = _options(q, r)
    heads = q.shape[0] * q.shape[1]
    p_list = torch.empty(heads * n * n + 2, dtype=torch.int16, device=q.device)  # Hopper's reads two more
    with torch.cuda.device_of(q):  # Triton launches on the current one
        if _on_hopper(q, k, v):
            from adasplash_kernels import forward_hopper  # here, as others' Triton may lack Gluon

            forward_hopper.forward(q, k, v, out, shift, p_list, tile_map, alpha, scale, options)
            return out, top, shift, tile_map
        shared = dict(p_q=q, p_k=k, p_v=v, p_o=out, p_shift=shift, p_map=tile_map, p_alpha=alpha, scale=scale)
        shared |= _strides(q) | options
        _forward[n, q.shape[1], q.shape[0]](p_top=top, p_list=p_list, **shared)
        if not options["EXACT"]:
            _mend[triton.cdiv(heads * n, 128),](heads=heads, **shared)
    return out, top, shift, tile_map


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
    shift: torch.Tensor, tile_map: torch.Tensor, alpha: torch.Tensor | None, r: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """The gradients of q, k and v in one, (B, T, 3, H, D)."""
    (q, k, v), (dout,), (out,) = _readable(q, k, v), _readable(dout), _readable(out)
    dqkv = _gradient_like(q)
    dq, dk, dv = unpacked(dqkv)
    n, _, for_queries, for_keys = _options(q, r)
    programs, grid = (q.shape[0] * q.shape[1] * n,), (n, q.shape[1], q.shape[0])
    shared = dict(p_q=q, p_k=k, p_v=v, p_do=dout, p_top=top, p_rows=shift.new_empty(*shift.shape, 2), p_alpha=alpha)
    shared |= dict(scale=scale, **_strides(q), **_strides(dout, "d"))
    groups = for_keys["TILE"] // for_keys["GROUP"]
    shared |= dict(p_list=torch.empty(2, *programs, n * groups, dtype=torch.int16, device=q.device))
    shared |= dict(p_count=shift.new_empty(2, *programs, dtype=torch.int32))
    with torch.cuda.device_of(q):
        _lists[*programs, 2](tile_map, shared["p_list"], shared["p_count"], n, tile_map.shape[3], groups, num_warps=1)
        _query_gradient[grid](p_o=out, p_shift=shift, p_dq=dq, **_strides(out, "o"), **shared, **for_queries)
        _key_value_gradient[grid](p_dk=dk, p_dv=dv, **shared, **for_keys)
    return dqkv


def _gradient_like(q):
    B, H, T, D = q.shape
    return q.new_empty(B, T, 3, H, D)


def _on_hopper(q, k, v):
    """Whether forward_hopper.py takes them."""
    on_hopper = q.is_cuda and not INTERPRETED.value and torch.cuda.get_device_capability(q.device) == (9, 0)
    return on_hopper and _copy_engine_takes(q, k, v)


def _copy_engine_takes(q, k, v):
    """Whether these have 16 bits, D up to 64 and rows that begin at multiples of 16 bytes; nothing is expanded, and no
    row begins before the end of another.
    """
    # each its own: a copy keeps the stride of a dimension of one element
    D, strides = q.shape[3], [s for x in (q, k, v) for s in x.stride()[:3]]
    whole = D % 8 == 0 and all(x % 8 == 0 for x in strides) and all(x.data_ptr() % 16 == 0 for x in (q, k, v))
    return q.element_size() == 2 and D <= 64 and whole and min(strides) > 0 and min(strides[2::3]) >= D


@torch.library.register_fake("adasplash::entmax")
def _(q, k, v, alpha, r, scale):
    return heads_last(q), *_saved(q)


@torch.library.register_fake("adasplash::entmax_packed")
def _(qkv, alpha, r, scale):
    q, _, _ = unpacked(qkv)
    return heads_last(q), *_saved(q)


@torch.library.register_fake("adasplash::entmax_backward")
def _(dout, q, k, v, out, top, shift, tile_map, alpha, r, scale):
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
torch.library.register_autograd("adasplash::entmax_backward", refuse_second_derivative)
