"""Causal alpha-entmax attention in Triton: the paper's algorithms; scores are recomputed tile by tile, never stored.

For one row, z are its raw scores q.k, c = (alpha - 1) * scale, r = 1 / (alpha - 1), u = [c (z - max z) - tau]_+, and
its probabilities are p = u^r; reference.py says how tau is found. A tile is TILE queries by TILE keys. On the diagonal
some queries do not see some keys. A program takes the queries (or the keys) of one tile and visits tiles by a list:

    forward    finds the row maxima and, on the way, a threshold that tau cannot be below and an estimate of tau; lists
               the tiles that exceed that threshold somewhere; sweeps over these until tau stands; adds up the output
               and marks on a map what has support
    lists      turns the map into lists by query block, or by key block
    query_gradient, key_value_gradient      visit the listed tiles only

Each output is written by one program, in a fixed order: two calls give the same bits.

Sources: AdaSplash (arXiv 2502.12082): algorithm 3 (tau, here with Newton's step for Halley's), 2 (forward), 5 (dQ) and
4 (dK, dV).
"""

import os

import torch
import triton
import triton.language as tl

from adasplash_kernels.reference import heads_last

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # Triton runs on CPU tensors, in Python
NAN = tl.constexpr(tl.PropagateNan.ALL)
TOLERANCE = 0.06  # on |h| / (alpha - 1) with 16 bits: the step from there is within their rounding
MAX_SWEEPS = tl.constexpr(60)  # 1 to 3 are usual; the bound is for rows that rounding keeps from settling

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
        return tl.max(tl.where(b_x == b_x, b_x, float("inf")), 1)
    else:
        return tl.reduce(b_x, 1, _larger)


@triton.jit
def _parts(b_x):
    """[M, N] -> [M, N / 8, 8]: a reduction of the middle axis takes no exchange between threads."""
    return tl.reshape(b_x, [b_x.shape[0], b_x.shape[1] // 8, 8])


@triton.jit
def _dot(b_x, b_y, b_sum):
    if INTERPRETED:  # which takes bfloat16 for the integers that hold it
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, b_sum, input_precision="ieee")


@triton.jit
def _load(p_x, stride, i_block, T, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr):
    """Rows i_block * BLOCK.. of x (T, D) whose rows lie stride apart: [BLOCK, BD], zero beyond T and D."""
    o_row = tl.arange(0, BLOCK)
    o_d = tl.arange(0, BD)
    p_block = p_x + tl.cast(i_block, tl.int64) * BLOCK * stride + (o_row[:, None] * stride + o_d[None, :])
    mask = o_row[:, None] < T - i_block * BLOCK
    if D < BD:
        mask = mask & (o_d[None, :] < D)
    return tl.load(p_block, mask=mask, other=0.0)


@triton.jit
def _store(p_x, stride, i_block, T, b_x, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr):
    o_row = tl.arange(0, BLOCK)
    o_d = tl.arange(0, BD)
    p_block = p_x + tl.cast(i_block, tl.int64) * BLOCK * stride + (o_row[:, None] * stride + o_d[None, :])
    mask = (o_row[:, None] < T - i_block * BLOCK) & (o_d[None, :] < D)
    tl.store(p_block, b_x.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def _mask(b_z, o_q, j, j_diagonal, BN: tl.constexpr):
    """Scores [BM, BN] with the keys of block j; from j_diagonal on, -inf where the query does not see the key."""
    if j >= j_diagonal:
        o_k = j * BN + tl.arange(0, BN)
        b_z = tl.where(o_q[:, None] >= o_k[None, :], b_z, float("-inf"))
    return b_z


@triton.jit
def _scores(b_q, p_k, s_k, j, o_q, i_q, T, D: tl.constexpr, BD: tl.constexpr, TILE: tl.constexpr):
    """Raw scores [TILE, TILE]; -inf where the query does not see the key."""
    return _mask(_dot(b_q, tl.trans(_load(p_k, s_k, j, T, D, BD, TILE)), None), o_q, j, i_q, TILE)


@triton.jit
def _above(b_z, top, tau, c, EXACT: tl.constexpr):
    """u. Without EXACT in one instruction, which rounds once more, to 2^-24 of the largest score."""
    if EXACT:
        b_u = (b_z - top) * c - tau
    else:
        b_u = b_z * c - (top * c + tau)
    return tl.maximum(b_u, 0.0, propagate_nan=NAN)


@triton.jit
def _log2(b_x, R: tl.constexpr):
    """To fp32 rounding, by some twenty instructions, where R = 0; else to 2^-22, by the one there is for it."""
    if R == 0 or INTERPRETED:
        return tl.log2(b_x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [b_x], tl.float32, is_pure=True, pack=1)


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
def _newton(total, lower, alpha, R: tl.constexpr):
    """From the row sums of u^r and u^(r - 1): h = |u|_r - 1 and -1 / h', so that Newton's step is their product."""
    if R == 2:
        norm = tl.sqrt(total)
    elif R == 1:
        norm = total
    else:
        norm = tl.exp2((alpha - 1) * tl.log2(total))
    return norm - 1, total / norm / lower


@triton.jit
def _exponent(tau, total, lower, r):
    """The m for which total, a function of tau, behaves here as |tau|^m; it does exactly where one key has it all."""
    return tl.minimum(tl.maximum(-tau * lower / total, 1.0), 1e6) * r


@triton.jit
def _guess(tau, total, lower, r, R: tl.constexpr):
    """Where total, behaving so, would be 1."""
    return tau * tl.exp2(-_log2(total, R) / _exponent(tau, total, lower, r))


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
def _shrink(tau, f, total, lower, r, R: tl.constexpr):
    """total and lower where tau is f times as far from the maximum, by _exponent; and f^(r - 1)."""
    log_f = _log2(f, R)
    shrink = tl.exp2((_exponent(tau, total, lower, r) - 1) * log_f)
    return total * shrink * f, lower * shrink, tl.exp2((r - 1) * log_f)


@triton.jit
def _rise(top, floor, least, most, total, lower, new_top, new_total, new_lower, c, alpha, r, R: tl.constexpr):
    """Raise the floor under tau, given the maximum of some more keys and, at the present floor, their sums.

    Of the keys before, least <= sum u^r and most >= sum u^(r - 1). Newton's step from below the root does not pass it,
    nor does it with such bounds for the sums. total and lower, estimates of the sums, follow.
    """
    new_top = _larger(top, new_top)
    new_floor = floor - (new_top - top) * c
    h, step = _newton(least + new_total, most + new_lower, alpha, R)
    # floors are < 0 and end up above -1; 1e-6 is for rounding; maxima far above what was overflow some sums, but not f
    f = tl.maximum(tl.minimum(1 + h * step / new_floor + 1e-6, tl.minimum(-1 / new_floor, 1.0)), 1e-6)
    old_f = tl.maximum(1 - new_floor / floor * (1 - f), 1e-6)
    total, lower, shrink = _shrink(floor, old_f, total, lower, r, R)
    most = most * shrink  # each u, at most the distance to the maximum, shrinks by f or more
    new_most = new_lower
    new_total, new_lower, shrink = _shrink(new_floor, f, new_total, new_lower, r, R)
    most += new_most * shrink
    return new_top, new_floor * f, most, tl.maximum(total + new_total, 1.0), tl.maximum(lower + new_lower, 1.0)


@triton.jit(do_not_specialize=["T", "H", "n"])
def _forward(
    p_q, p_k, p_v, p_o, p_top, p_tau, p_list, p_map, p_alpha, scale, T, H, n,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr,
    TOLERANCE: tl.constexpr,
):  # fmt: skip
    i_bh, i_q = tl.program_id(0) // n, n - 1 - tl.program_id(0) % n  # the longest rows first
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_o += (i_b * T * H + i_h) * D
    p_list += tl.program_id(0).to(tl.int64) * n
    alpha, r, c = _parameters(p_alpha, scale, R)
    o_q = i_q * TILE + tl.arange(0, TILE)
    o_32 = tl.arange(0, 32)
    b_q = _load(p_q, s_qt, i_q, T, D, BD, TILE)

    # The row maxima, and the tiles that exceed the floor under tau somewhere. The diagonal first, then backwards, since
    # near keys are often the largest. As long as the diagonal's scores are at hand, its own sums raise the floor twice
    zero, zero_8 = tl.zeros([TILE], tl.float32), tl.zeros([TILE, 8], tl.float32)
    b_z = _scores(b_q, p_k, s_kt, i_q, o_q, i_q, T, D, BD, TILE)
    top, floor = _max(b_z), zero - 1
    for _time in tl.static_range(2):
        b_p, b_lower = _powers(_above(b_z, top[:, None], floor[:, None], c, EXACT), r, R)
        h, step = _newton(tl.sum(b_p, 1), tl.sum(b_lower, 1), alpha, R)
        floor *= tl.maximum(tl.minimum(1 + h * step / floor + 1e-6, 1.0), 1e-6)
    b_p, b_lower = _powers(_above(b_z, top[:, None], floor[:, None], c, EXACT), r, R)
    top, floor, most, total, lower = _rise(
        top, floor, zero, zero, zero, zero, top, tl.sum(b_p, 1), tl.sum(b_lower, 1), c, alpha, r, R
    )
    tl.store(p_list, i_q.to(tl.int16))
    n_list = 1
    for done in range(1, i_q + 1, 32):  # 32 tiles: a bit of an int a tile, so that warps need not meet at each tile
        bits = tl.zeros([TILE, 8], tl.int32)
        # sums and maxima stay in 8 parts of a row, which takes no exchange between threads, until they are used
        top_8, total_8, lower_8 = zero_8 - float("inf"), zero_8, zero_8
        n_now = tl.minimum(i_q + 1 - done, 32)
        for i in range(0, n_now):
            b_z = _dot(b_q, tl.trans(_load(p_k, s_kt, i_q - done - i, T, D, BD, TILE)), None)
            top_8 = _larger(top_8, _max(_parts(b_z)))
            b_p, b_lower = _powers(_above(b_z, top[:, None], floor[:, None], c, EXACT), r, R)
            p_8 = tl.sum(_parts(b_p), 1)
            total_8, lower_8 = total_8 + p_8, lower_8 + tl.sum(_parts(b_lower), 1)
            bits |= (p_8 > 0).to(tl.int32) << i
            if (i < 3) | ((i & 3) == 3) | (i == n_now - 1):
                top, floor, most, total, lower = _rise(
                    top, floor, zero + 1, most, total, lower, _max(top_8), tl.sum(total_8, 1), tl.sum(lower_8, 1),
                    c, alpha, r, R)  # fmt: skip
                total_8, lower_8 = zero_8, zero_8
        flags = (tl.reduce(tl.where(o_q < T, tl.reduce(bits, 1, _either), 0), 0, _either) >> o_32) & 1  # [32]
        places = n_list + tl.cumsum(flags, 0) - flags
        tl.store(p_list + places, (i_q - done - o_32).to(tl.int16), mask=flags > 0)
        n_list += tl.sum(flags, 0)
    tl.debug_barrier()  # the list is read by all from here

    ceiling = -tl.exp2((1 - alpha) * tl.log2((o_q + 1).to(tl.float32)))  # equal scores have tau here, others below
    tau = tl.minimum(_guess(floor, total, lower, r, R), ceiling)
    step, go = zero, 1
    while go > 0:
        total_8, lower_8 = zero_8, zero_8
        for i in range(0, n_list):
            j = tl.load(p_list + i).to(tl.int32)
            b_z = _scores(b_q, p_k, s_kt, j, o_q, i_q, T, D, BD, TILE)
            b_p, b_lower = _powers(_above(b_z, top[:, None], tau[:, None], c, EXACT), r, R)
            total_8, lower_8 = total_8 + tl.sum(_parts(b_p), 1), lower_8 + tl.sum(_parts(b_lower), 1)
        total, lower = tl.sum(total_8, 1), tl.sum(lower_8, 1)
        h, step = _newton(total, lower, alpha, R)
        new_tau = tau + h * step
        if go <= 2:  # Newton's step does not pass the root; the guess lands nearer to it, on either side
            new_tau = tl.maximum(new_tau, _guess(tau, total, lower, r, R))
        new_tau = tl.minimum(tl.maximum(new_tau, floor), ceiling)
        if EXACT:
            tolerance = 1e-6
        else:
            tolerance = TOLERANCE * (alpha - 1)
        moving = (tl.abs(h) > tolerance) & (new_tau != tau) & (o_q < T)  # false for NaN
        tau = new_tau
        go = tl.where(go < MAX_SWEEPS, go + 1, 0) * tl.max(moving.to(tl.int32), 0)

    # the output, and which of the tiles have support
    total_8, b_o = zero_8, tl.zeros([TILE, BD], tl.float32)
    p_map += (i_bh.to(tl.int64) * n + i_q) * n
    for done in range(0, n_list, 32):
        bits = tl.zeros([TILE, 8], tl.int32)
        for i in range(0, tl.minimum(n_list - done, 32)):
            j = tl.load(p_list + done + i).to(tl.int32)
            b_z = _scores(b_q, p_k, s_kt, j, o_q, i_q, T, D, BD, TILE)
            b_p, _ = _powers(_above(b_z, top[:, None], tau[:, None], c, EXACT), r, R)
            b_v = _load(p_v, s_vt, j, T, D, BD, TILE)
            b_o = _dot(b_p.to(b_v.dtype), b_v, b_o)
            p_8 = tl.sum(_parts(b_p), 1)
            total_8 += p_8
            bits |= (p_8 != 0).to(tl.int32) << i  # so that NaN has support
        flags = (tl.reduce(tl.where(o_q < T, tl.reduce(bits, 1, _either), 0), 0, _either) >> o_32) & 1
        tiles = tl.load(p_list + done + o_32, mask=done + o_32 < n_list, other=0).to(tl.int32)
        tl.store(p_map + tiles, flags.to(tl.int8), mask=flags > 0)
    total = tl.sum(total_8, 1)
    h, _ = _newton(total, total, alpha, R)  # the slope of the last sweep, hardly another one, does for a last step
    tau = tl.minimum(tl.maximum(tau + h * step, floor), ceiling)
    o_row = i_bh.to(tl.int64) * n * TILE + o_q
    if EXACT:
        tl.store(p_top + o_row, top)
        tl.store(p_tau + o_row, tau)
    else:
        tl.store(p_tau + o_row, top * c + tau)
    _store(p_o, H * D, i_q, T, b_o / total[:, None], D, BD, TILE)


# -----------------------------------------------------------------------------
# backward


@triton.jit(do_not_specialize=["n", "s_line", "s_entry"])
def _lists(p_map, p_list, p_count, n, s_line, s_entry, BLOCK: tl.constexpr):
    """The tiles that are marked in each line of the map (n, n), ascending: lines are its rows or its columns."""
    i_bh, i_line = (tl.program_id(0) // n).to(tl.int64), (tl.program_id(0) % n).to(tl.int64)
    p_map += i_bh * n * n + i_line * s_line
    p_list += tl.program_id(0).to(tl.int64) * n
    n_list = 0
    for start in range(0, n, BLOCK):
        o_i = start + tl.arange(0, BLOCK)
        flags = tl.load(p_map + tl.cast(o_i, tl.int64) * s_entry, mask=o_i < n, other=0).to(tl.int32)
        tl.store(p_list + n_list + tl.cumsum(flags, 0) - flags, o_i.to(tl.int16), mask=flags > 0)
        n_list += tl.sum(flags, 0)
    tl.store(p_count + tl.program_id(0), n_list)


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
    b_q = _load(p_q, s_qt, i_q, T, D, BD, TILE)
    b_do = _load(p_do, s_dt, i_q, T, D, BD, TILE)
    b_o = _load(p_o, s_ot, i_q, T, D, BD, TILE)
    mean = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    b_g, b_l = tl.zeros([TILE, BD], tl.float32), tl.zeros([TILE, BD], tl.float32)
    g_8, l_8 = tl.zeros([TILE, 8], tl.float32), tl.zeros([TILE, 8], tl.float32)
    for i in range(0, tl.load(p_count + i_list) * PARTS):
        j = tl.load(p_list + i // PARTS).to(tl.int32) * PARTS + i % PARTS
        b_k = _load(p_k, s_kt, j, T, D, BD, BN)
        b_v = _load(p_v, s_vt, j, T, D, BD, BN)
        b_z = _dot(b_q, tl.trans(b_k), None)  # [TILE, BN]
        b_dp = _dot(b_do, tl.trans(b_v), None)
        b_z = _mask(b_z, o_q, j, i_q * PARTS, BN)
        _, b_lower = _powers(_above(b_z, top, tau, c, EXACT), r, R)  # p^(2 - alpha)
        b_ds = b_lower * (b_dp - mean[:, None])
        b_g = _dot(b_ds.to(b_k.dtype), b_k, b_g)
        b_l = _dot(b_lower.to(b_k.dtype), b_k, b_l)
        g_8, l_8 = g_8 + tl.sum(_parts(b_ds), 1), l_8 + tl.sum(_parts(b_lower), 1)
    shift = tl.sum(g_8, 1) / tl.sum(l_8, 1)
    b_dq = scale * (b_g - shift[:, None] * b_l)
    b_dq = tl.where(o_q[:, None] == 0, b_dq * 0.0, b_dq)  # the row of one key: p is 1 whatever the score (or NaN)
    tl.store(p_delta + o_row, mean + shift)
    _store(p_dq, 3 * H * D, i_q, T, b_dq, D, BD, TILE)


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
    b_k = _load(p_k, s_kt, i_k, T, D, BD, TILE)
    b_v = _load(p_v, s_vt, i_k, T, D, BD, TILE)
    b_dk, b_dv = tl.zeros([TILE, BD], tl.float32), tl.zeros([TILE, BD], tl.float32)
    for j in range(0, tl.load(p_count + tl.program_id(0)) * PARTS):
        i = tl.load(p_list + j // PARTS).to(tl.int32) * PARTS + j % PARTS
        o_q = i * BM + tl.arange(0, BM)
        b_q = _load(p_q, s_qt, i, T, D, BD, BM)
        b_do = _load(p_do, s_dt, i, T, D, BD, BM)
        tau = tl.load(p_tau + o_q)[None, :]
        top = tl.load(p_top + o_q)[None, :] if EXACT else 0.0
        delta = tl.load(p_delta + o_q, mask=o_q < T, other=0.0)[None, :]  # beyond T it may be NaN
        b_z = _dot(b_k, tl.trans(b_q), None)  # [TILE, BM], the transpose of the scores
        b_dp = _dot(b_v, tl.trans(b_do), None)
        if i * BM < i_k * TILE + TILE:
            b_z = tl.where(o_q[None, :] >= o_k[:, None], b_z, float("-inf"))
        b_p, b_lower = _powers(_above(b_z, top, tau, c, EXACT), r, R)
        b_dv = _dot(b_p.to(b_do.dtype), b_do, b_dv)
        b_ds = b_lower * (b_dp - delta)
        if i == 0:  # the row of one key
            b_ds = tl.where(o_q[None, :] == 0, b_ds * 0.0, b_ds)
        b_dk = _dot(b_ds.to(b_q.dtype), b_q, b_dk)
    _store(p_dk, 3 * H * D, i_k, T, b_dk * scale, D, BD, TILE)
    _store(p_dv, 3 * H * D, i_k, T, b_dv, D, BD, TILE)


# -----------------------------------------------------------------------------
# launchers


# for 16 bits and D <= 64; the bounds on a thread's registers let more programs share a multiprocessor
FORWARD = {"num_stages": 2, "maxnreg": 128}
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


@torch.library.custom_op("adasplash::entmax", mutates_args=())
def entmax_kernels(
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
        p_map=tile_map, p_alpha=alpha, scale=scale, TOLERANCE=TOLERANCE, **_strides(q=q, k=k, v=v), **options,
    )  # fmt: skip
    return out, top, tau, tile_map


@torch.library.custom_op("adasplash::entmax_packed", mutates_args=())
def entmax_kernels_packed(
    qkv: torch.Tensor, alpha: torch.Tensor | None, r: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of qkv (B, T, 3, H, D), whose gradient is one tensor too."""
    return entmax_kernels(*unpacked(qkv), alpha, r, scale)


@torch.library.custom_op("adasplash::entmax_backward", mutates_args=())
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


@entmax_kernels.register_fake
def _(q, k, v, alpha, r, scale):
    return heads_last(q), *_saved(q)


@entmax_kernels_packed.register_fake
def _(qkv, alpha, r, scale):
    q, _, _ = unpacked(qkv)
    return heads_last(q), *_saved(q)


@entmax_kernels_backward.register_fake
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


entmax_kernels.register_autograd(_backward, setup_context=_setup_context)
entmax_kernels_packed.register_autograd(_backward_packed, setup_context=_setup_context)
