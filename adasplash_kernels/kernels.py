"""Causal alpha-entmax attention in Triton: the paper's algorithms; scores are recomputed tile by tile, never stored.

For one row, z are its raw scores q.k, c = (alpha - 1) * scale, r = 1 / (alpha - 1), u = [c (z - max z) - tau]_+, and
its probabilities are p = u^r; reference.py says how tau is found. A tile is BM queries by BN keys: full where every
query sees every key, else diagonal. Diagonal tiles are always visited. Full tiles are listed:

    forward    finds the row maxima and lists the tiles that exceed maximum - 1 somewhere (no other has support, as
               tau >= -1), sweeps over those until tau stands, adds up the output and lists what has support
    columns    turns the lists by query block into lists by key block
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
MAX_SWEEPS = tl.constexpr(60)  # 4 to 7 are usual; the bound is for rows that rounding keeps from settling

# -----------------------------------------------------------------------------
# tiles


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=NAN)


@triton.jit
def _row_max(b_z):
    """The maximum of each row, NaN (or inf, which becomes NaN later) where the row has one."""
    if INTERPRETED:  # whose reductions by a function of one's own are slow
        return tl.max(tl.where(b_z == b_z, b_z, float("inf")), 1)
    else:
        return tl.reduce(b_z, 1, _larger)


@triton.jit
def _dot(b_x, b_y, b_sum):
    if INTERPRETED:  # which takes bfloat16 for the integers that hold it
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, b_sum, input_precision="ieee")


@triton.jit
def _load(p_x, stride, i_tile, T, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows i_tile * BLOCK.. of x (T, D) whose rows lie stride apart: [BLOCK, BD], zero beyond D and, if MASKED, T."""
    o_row = tl.arange(0, BLOCK)
    o_d = tl.arange(0, BD)
    p_tile = p_x + tl.cast(i_tile, tl.int64) * BLOCK * stride + (o_row[:, None] * stride + o_d[None, :])
    if MASKED:
        return tl.load(p_tile, mask=(o_row[:, None] < T - i_tile * BLOCK) & (o_d[None, :] < D), other=0.0)
    elif D < BD:
        return tl.load(p_tile, mask=o_d[None, :] < D, other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit
def _store(p_x, stride, i_tile, T, b_x, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr):
    o_row = tl.arange(0, BLOCK)
    o_d = tl.arange(0, BD)
    p_tile = p_x + tl.cast(i_tile, tl.int64) * BLOCK * stride + (o_row[:, None] * stride + o_d[None, :])
    mask = (o_row[:, None] < T - i_tile * BLOCK) & (o_d[None, :] < D)
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def _scores(b_q, b_k, o_q, o_k, T, MASKED: tl.constexpr):
    """Raw scores [BM, BN]; in a diagonal tile -inf where the query does not see the key."""
    b_z = _dot(b_q, tl.trans(b_k), None)
    if MASKED:
        b_z = tl.where((o_q[:, None] >= o_k[None, :]) & (o_k[None, :] < T), b_z, float("-inf"))
    return b_z


@triton.jit
def _log2(b_x, R: tl.constexpr):
    """To 2^-22, by the one instruction there is for it, where R = -1; to fp32 rounding, by some twenty, where R = 0."""
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
def _sum_tile(b_q, p_k, s_k, j, o_q, top, tau, c, r, T, total, lower, R: tl.constexpr, D: tl.constexpr,
              BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    b_k = _load(p_k, s_k, j, T, D, BD, BN, MASKED)
    b_z = _scores(b_q, b_k, o_q, j * BN + tl.arange(0, BN), T, MASKED)
    b_u = tl.maximum((b_z - top[:, None]) * c - tau[:, None], 0.0, propagate_nan=NAN)  # [BM, BN]
    b_p, b_lower = _powers(b_u, r, R)
    return total + tl.sum(b_p, 1), lower + tl.sum(b_lower, 1)


@triton.jit
def _sum_tile_twice(b_q, p_k, s_k, j, o_q, top, tau_a, tau_b, c, r, T, total_a, lower_a, total_b, lower_b,
                    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
                    MASKED: tl.constexpr):  # fmt: skip
    b_k = _load(p_k, s_k, j, T, D, BD, BN, MASKED)
    b_z = (_scores(b_q, b_k, o_q, j * BN + tl.arange(0, BN), T, MASKED) - top[:, None]) * c
    b_p, b_lower = _powers(tl.maximum(b_z - tau_a[:, None], 0.0, propagate_nan=NAN), r, R)
    total_a, lower_a = total_a + tl.sum(b_p, 1), lower_a + tl.sum(b_lower, 1)
    b_p, b_lower = _powers(tl.maximum(b_z - tau_b[:, None], 0.0, propagate_nan=NAN), r, R)
    return total_a, lower_a, total_b + tl.sum(b_p, 1), lower_b + tl.sum(b_lower, 1)


@triton.jit
def _output_tile(b_q, p_k, s_k, p_v, s_v, j, o_q, top, tau, c, r, T, total, lower, b_o, R: tl.constexpr,
                 D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    b_k = _load(p_k, s_k, j, T, D, BD, BN, MASKED)
    b_z = _scores(b_q, b_k, o_q, j * BN + tl.arange(0, BN), T, MASKED)
    b_u = tl.maximum((b_z - top[:, None]) * c - tau[:, None], 0.0, propagate_nan=NAN)
    b_p, b_lower = _powers(b_u, r, R)
    b_v = _load(p_v, s_v, j, T, D, BD, BN, MASKED)
    b_o = _dot(b_p.to(b_v.dtype), b_v, b_o)
    row_p = tl.sum(b_p, 1)
    return total + row_p, lower + tl.sum(b_lower, 1), b_o, row_p


@triton.jit(do_not_specialize=["T", "H", "n_q", "n_k"])
def _forward(
    p_q, p_k, p_v, p_o, p_top, p_tau, p_list, p_count, p_map, p_alpha, scale, T, H, n_q, n_k,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TOLERANCE: tl.constexpr,
):  # fmt: skip
    i_bh, i_q = tl.program_id(0) // n_q, n_q - 1 - tl.program_id(0) % n_q  # the longest rows first
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_o += (i_b * T * H + i_h) * D
    p_list += (i_bh.to(tl.int64) * n_q + i_q) * n_k
    alpha, r, c = _parameters(p_alpha, scale, R)
    o_q = i_q * BM + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_32 = tl.arange(0, 32)
    b_q = _load(p_q, s_qt, i_q, T, D, BD, BM, True)
    n_full, n_end = i_q * BM // BN, tl.cdiv(tl.minimum(i_q * BM + BM, T), BN)

    # the row maxima; from the diagonal backwards, since near keys are often the largest
    top = tl.full([BM], float("-inf"), tl.float32)
    for j in range(n_full, n_end):
        b_z = _scores(b_q, _load(p_k, s_kt, j, T, D, BD, BN, True), o_q, j * BN + o_n, T, True)
        top = _larger(top, _row_max(b_z))
    n_list = 0
    for done in range(0, n_full, 32):  # 32 tiles: a bit of an int a tile, so that warps need not meet at each tile
        last, n = n_full - 1 - done, tl.minimum(n_full - done, 32)
        bits = tl.zeros([BM], tl.int32)
        for i in range(0, n):
            b_z = _scores(b_q, _load(p_k, s_kt, last - i, T, D, BD, BN, False), o_q, o_n, T, False)
            tile_top = _row_max(b_z)
            top = _larger(top, tile_top)
            bits |= ((tile_top - top) * c > -1.0).to(tl.int32) << i
        flags = tl.max((bits[:, None] >> o_32[None, :]) & 1, 0)  # [32]
        places = n_list + tl.cumsum(flags, 0) - flags
        tl.store(p_list + places, (last - o_32).to(tl.int16), mask=flags > 0)
        n_list += tl.sum(flags, 0)
    tl.debug_barrier()  # the list is read by all from here

    # tau, in [-1, -n^(1 - alpha)]. The first sweep looks at two points
    n_keys = tl.minimum(i_q * BM + BM, T).to(tl.float32)
    width = tl.zeros([BM], tl.float32) + (1 - tl.exp2((1 - alpha) * tl.log2(n_keys)))
    tau_a, tau_b = 0.15 * width - 1, 0.5 * width - 1
    total_a, lower_a = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    total_b, lower_b = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    for j in range(n_full, n_end):
        total_a, lower_a, total_b, lower_b = _sum_tile_twice(
            b_q, p_k, s_kt, j, o_q, top, tau_a, tau_b, c, r, T, total_a, lower_a, total_b, lower_b,
            R, D, BD, BN, True)  # fmt: skip
    for i in range(0, n_list):
        j = tl.load(p_list + i).to(tl.int32)
        total_a, lower_a, total_b, lower_b = _sum_tile_twice(
            b_q, p_k, s_kt, j, o_q, top, tau_a, tau_b, c, r, T, total_a, lower_a, total_b, lower_b,
            R, D, BD, BN, False)  # fmt: skip
    h_a, step_a = _newton(total_a, lower_a, alpha, R)
    h_b, step_b = _newton(total_b, lower_b, alpha, R)
    # Newton's steps from both do not pass the root; the cubic in h through the two points and slopes lands nearer to
    # it, on either side, from where the next step does not pass it again
    tau = _larger(_larger(tau_a + h_a * step_a, tau_b + h_b * step_b), tl.zeros([BM], tl.float32) - 1)
    t = h_a / (h_a - h_b)
    cubic = tau_a + (tau_b - tau_a) * t * t * (3 - 2 * t)
    cubic += (h_a - h_b) * t * (1 - t) * ((1 - t) * step_a - t * step_b)
    tau = tl.where(cubic > tau, tl.minimum(cubic, tl.where(h_b < 0, tau_b, width - 1)), tau)
    go = 1
    while go > 0:
        total, lower = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
        for j in range(n_full, n_end):
            total, lower = _sum_tile(b_q, p_k, s_kt, j, o_q, top, tau, c, r, T, total, lower, R, D, BD, BN, True)
        for i in range(0, n_list):
            j = tl.load(p_list + i).to(tl.int32)
            total, lower = _sum_tile(b_q, p_k, s_kt, j, o_q, top, tau, c, r, T, total, lower, R, D, BD, BN, False)
        h, step = _newton(total, lower, alpha, R)
        new_tau = tl.maximum(tau + h * step, -1.0, propagate_nan=NAN)
        moving = (tl.abs(h) > tl.maximum(TOLERANCE * (alpha - 1), 1e-6)) & (new_tau != tau)  # false for NaN
        tau = new_tau
        go = tl.where(go < MAX_SWEEPS, go + 1, 0) * tl.max(moving.to(tl.int32), 0)

    # the output, and which of the tiles have support
    total, lower = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BD], tl.float32)
    for j in range(n_full, n_end):
        total, lower, b_o, _ = _output_tile(
            b_q, p_k, s_kt, p_v, s_vt, j, o_q, top, tau, c, r, T, total, lower, b_o, R, D, BD, BN, True)  # fmt: skip
    n_active = 0
    for done in range(0, n_list, 32):
        n = tl.minimum(n_list - done, 32)
        bits = tl.zeros([BM], tl.int32)
        for i in range(0, n):
            j = tl.load(p_list + done + i).to(tl.int32)
            total, lower, b_o, row_p = _output_tile(
                b_q, p_k, s_kt, p_v, s_vt, j, o_q, top, tau, c, r, T, total, lower, b_o,
                R, D, BD, BN, False)  # fmt: skip
            bits |= (row_p > 0).to(tl.int32) << i
        flags = tl.max((bits[:, None] >> o_32[None, :]) & 1, 0)
        tiles = tl.load(p_list + done + o_32, mask=o_32 < n, other=0)
        tl.debug_barrier()  # read by all before the shorter list overwrites it
        tl.store(p_list + n_active + tl.cumsum(flags, 0) - flags, tiles, mask=flags > 0)
        p_column = p_map + (i_bh.to(tl.int64) * n_k + tiles) * n_q + i_q
        tl.store(p_column, tl.full([32], 1, tl.int8), mask=flags > 0)
        n_active += tl.sum(flags, 0)
    h, step = _newton(total, lower, alpha, R)
    tau = tl.maximum(tau + h * step, -1.0, propagate_nan=NAN)
    tl.store(p_count + i_bh * n_q + i_q, n_active)
    o_row = i_bh.to(tl.int64) * n_q * BM + o_q
    tl.store(p_top + o_row, top)
    tl.store(p_tau + o_row, tau)
    _store(p_o, H * D, i_q, T, b_o / total[:, None], D, BD, BM)


# -----------------------------------------------------------------------------
# backward


@triton.jit(do_not_specialize=["n_q"])
def _columns(p_map, p_list, p_count, n_q, BLOCK: tl.constexpr):
    """The query blocks that have support in a key block, ascending, from a row of the map (B H n_k, n_q)."""
    i = tl.program_id(0).to(tl.int64)
    n = 0
    for start in range(0, n_q, BLOCK):
        o_i = start + tl.arange(0, BLOCK)
        flags = tl.load(p_map + i * n_q + o_i, mask=o_i < n_q, other=0).to(tl.int32)
        tl.store(p_list + i * n_q + n + tl.cumsum(flags, 0) - flags, o_i.to(tl.int16), mask=flags > 0)
        n += tl.sum(flags, 0)
    tl.store(p_count + i, n)


@triton.jit
def _query_gradient_tile(b_q, b_do, p_k, s_k, p_v, s_v, j, o_q, top, tau, mean, c, r, T, b_g, b_l, row_g, row_l,
                         R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
                         MASKED: tl.constexpr):  # fmt: skip
    b_k = _load(p_k, s_k, j, T, D, BD, BN, MASKED)
    b_v = _load(p_v, s_v, j, T, D, BD, BN, MASKED)
    b_z = _scores(b_q, b_k, o_q, j * BN + tl.arange(0, BN), T, MASKED)
    b_u = tl.maximum((b_z - top[:, None]) * c - tau[:, None], 0.0, propagate_nan=NAN)
    _, b_lower = _powers(b_u, r, R)  # [BM, BN], p^(2 - alpha)
    b_dp = _dot(b_do, tl.trans(b_v), None)
    b_ds = b_lower * (b_dp - mean[:, None])
    b_g = _dot(b_ds.to(b_k.dtype), b_k, b_g)
    b_l = _dot(b_lower.to(b_k.dtype), b_k, b_l)
    return b_g, b_l, row_g + tl.sum(b_ds, 1), row_l + tl.sum(b_lower, 1)


@triton.jit(do_not_specialize=["T", "H", "n_q", "n_k"])
def _query_gradient(
    p_q, p_k, p_v, p_o, p_do, p_dq, p_top, p_tau, p_delta, p_list, p_count, p_alpha, scale, T, H, n_q, n_k,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_ob, s_oh, s_ot, s_db, s_dh, s_dt,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dQ = scale * sum of u^(r-1) (dp - delta) k, where delta is the mean of dp weighted by u^(r-1).

    One visit of each tile: with the p-weighted mean, dO . O, for a first delta, both sums of k are gathered and
    combined when delta is known. A listed tile is visited in PARTS of BN keys, which spares registers.
    """
    i_bh, i_q = tl.program_id(0) // n_q, n_q - 1 - tl.program_id(0) % n_q
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_o += i_b * s_ob + i_h * s_oh
    p_do += i_b * s_db + i_h * s_dh
    p_dq += (i_b * T * H + i_h) * D
    p_list += (i_bh.to(tl.int64) * n_q + i_q) * n_k
    alpha, r, c = _parameters(p_alpha, scale, R)
    o_q = i_q * BM + tl.arange(0, BM)
    o_row = i_bh.to(tl.int64) * n_q * BM + o_q
    top, tau = tl.load(p_top + o_row), tl.load(p_tau + o_row)
    b_q = _load(p_q, s_qt, i_q, T, D, BD, BM, True)
    b_do = _load(p_do, s_dt, i_q, T, D, BD, BM, True)
    b_o = _load(p_o, s_ot, i_q, T, D, BD, BM, True)
    mean = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    b_g, b_l = tl.zeros([BM, BD], tl.float32), tl.zeros([BM, BD], tl.float32)
    row_g, row_l = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    for j in range(i_q * BM // BN, tl.cdiv(tl.minimum(i_q * BM + BM, T), BN)):
        b_g, b_l, row_g, row_l = _query_gradient_tile(
            b_q, b_do, p_k, s_kt, p_v, s_vt, j, o_q, top, tau, mean, c, r, T, b_g, b_l, row_g, row_l,
            R, D, BD, BN, True)  # fmt: skip
    for i in range(0, tl.load(p_count + i_bh * n_q + i_q) * PARTS):
        j = tl.load(p_list + i // PARTS).to(tl.int32) * PARTS + i % PARTS
        b_g, b_l, row_g, row_l = _query_gradient_tile(
            b_q, b_do, p_k, s_kt, p_v, s_vt, j, o_q, top, tau, mean, c, r, T, b_g, b_l, row_g, row_l,
            R, D, BD, BN, False)  # fmt: skip
    shift = row_g / row_l
    b_dq = scale * (b_g - shift[:, None] * b_l)
    b_dq = tl.where(o_q[:, None] == 0, b_dq * 0.0, b_dq)  # the row of one key: p is 1 whatever the score (or NaN)
    tl.store(p_delta + o_row, mean + shift)
    _store(p_dq, H * D, i_q, T, b_dq, D, BD, BM)


@triton.jit
def _key_value_gradient_tile(b_k, b_v, p_q, s_q, p_do, s_do, p_top, p_tau, p_delta, i, o_k, c, r, T, b_dk, b_dv,
                             R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
                             MASKED: tl.constexpr):  # fmt: skip
    b_q = _load(p_q, s_q, i, T, D, BD, BM, True)
    b_do = _load(p_do, s_do, i, T, D, BD, BM, True)
    o_q = i * BM + tl.arange(0, BM)
    b_z = _dot(b_k, tl.trans(b_q), None)  # [BN, BM], the transpose of the scores
    b_dp = _dot(b_v, tl.trans(b_do), None)
    top, tau, delta = tl.load(p_top + o_q), tl.load(p_tau + o_q), tl.load(p_delta + o_q)
    if MASKED:
        b_z = tl.where((o_q[None, :] >= o_k[:, None]) & (o_q[None, :] < T), b_z, float("-inf"))
    b_u = tl.maximum((b_z - top[None, :]) * c - tau[None, :], 0.0, propagate_nan=NAN)
    b_p, b_lower = _powers(b_u, r, R)
    b_dv = _dot(b_p.to(b_do.dtype), b_do, b_dv)
    b_ds = b_lower * (b_dp - delta[None, :])
    if MASKED:
        b_ds = tl.where(o_q[None, :] == 0, b_ds * 0.0, b_ds)
    b_dk = _dot(b_ds.to(b_q.dtype), b_q, b_dk)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["T", "H", "n_q", "n_k"])
def _key_value_gradient(
    p_q, p_k, p_v, p_do, p_dk, p_dv, p_top, p_tau, p_delta, p_list, p_count, p_alpha, scale, T, H, n_q, n_k,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_db, s_dh, s_dt,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dK = scale * dS^T Q and dV = P^T dO, of one key block. A listed tile is visited in PARTS of BM queries."""
    i_bh, i_k = tl.program_id(0) // n_k, tl.program_id(0) % n_k
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_do += i_b * s_db + i_h * s_dh
    p_dk += (i_b * T * H + i_h) * D
    p_dv += (i_b * T * H + i_h) * D
    p_list += (i_bh.to(tl.int64) * n_k + i_k) * n_q
    p_top += i_bh.to(tl.int64) * n_q * PARTS * BM
    p_tau += i_bh.to(tl.int64) * n_q * PARTS * BM
    p_delta += i_bh.to(tl.int64) * n_q * PARTS * BM
    alpha, r, c = _parameters(p_alpha, scale, R)
    o_k = i_k * BN + tl.arange(0, BN)
    b_k = _load(p_k, s_kt, i_k, T, D, BD, BN, True)
    b_v = _load(p_v, s_vt, i_k, T, D, BD, BN, True)
    b_dk, b_dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32)
    for i in range(i_k * BN // BM, tl.minimum(tl.cdiv(i_k * BN + BN, BM), n_q * PARTS)):
        b_dk, b_dv = _key_value_gradient_tile(
            b_k, b_v, p_q, s_qt, p_do, s_dt, p_top, p_tau, p_delta, i, o_k, c, r, T, b_dk, b_dv,
            R, D, BD, BM, True)  # fmt: skip
    for n in range(0, tl.load(p_count + i_bh * n_k + i_k) * PARTS):
        i = tl.load(p_list + n // PARTS).to(tl.int32) * PARTS + n % PARTS
        b_dk, b_dv = _key_value_gradient_tile(
            b_k, b_v, p_q, s_qt, p_do, s_dt, p_top, p_tau, p_delta, i, o_k, c, r, T, b_dk, b_dv,
            R, D, BD, BM, False)  # fmt: skip
    _store(p_dk, H * D, i_k, T, b_dk * scale, D, BD, BN)
    _store(p_dv, H * D, i_k, T, b_dv, D, BD, BN)


# -----------------------------------------------------------------------------
# launchers


# for 16 bits and D <= 64; the bounds on a thread's registers let more programs share a multiprocessor
FORWARD = {"num_stages": 2, "maxnreg": 128}
QUERY_GRADIENT = {"PARTS": 2, "num_stages": 3, "maxnreg": 168}
KEY_VALUE_GRADIENT = {"PARTS": 2, "num_stages": 3, "maxnreg": 168}


def _options(q, r):
    """The counts of query and key blocks, and for each kernel its tile, launch options and what else is constant."""
    T, D = q.shape[2:]
    if q.dtype == torch.float32:
        size, num_warps, num_stages = 32, 4 if D <= 64 else 8, 2 if D <= 64 else 1
    else:
        size, num_warps, num_stages = 64, 4 if D <= 64 else 8, 2
    n = triton.cdiv(T, size)
    common = dict(T=T, H=q.shape[1], n_q=n, n_k=n, D=D, BD=max(16, triton.next_power_of_2(D)), BM=size, BN=size)
    # 16 bits do without the accurate logarithm
    common |= dict(R=-1 if r == 0 and size == 64 else r, num_warps=num_warps, num_stages=num_stages)
    tuned = FORWARD, QUERY_GRADIENT, KEY_VALUE_GRADIENT
    untuned = {}, {"PARTS": 1}, {"PARTS": 1}
    options = tuned if size == 64 and D <= 64 else untuned
    forward, query_gradient, key_value_gradient = (common | x for x in options)
    if r == 0:
        forward.pop("maxnreg", None)  # powers need the registers
    query_gradient["BN"] //= query_gradient["PARTS"]
    key_value_gradient["BM"] //= key_value_gradient["PARTS"]
    return n, forward, query_gradient, key_value_gradient


def _strides(**tensors):
    return {f"s_{name}{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bht")}


def _readable(x):
    """x, copied if the elements of a row lie apart."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _saved(q):
    """Empty tensors for what the backward needs: of each row, to whole blocks, max z and tau; tile lists, their
    lengths, the map of tiles."""
    BH, (n, forward, *_) = q.shape[0] * q.shape[1], _options(q, 0)
    top = q.new_empty(BH, n * forward["BM"], dtype=torch.float32)
    lists, counts = q.new_zeros(BH, n, n, dtype=torch.int16), q.new_empty(BH, n, dtype=torch.int32)
    return top, torch.empty_like(top), lists, counts, q.new_zeros(BH, n, n, dtype=torch.int8)


@torch.library.custom_op("adasplash::entmax", mutates_args=())
def entmax_kernels(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alpha: torch.Tensor | None, r: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v (B, H, T, D), D <= 128, float32 or 16 bits -> out, and what the backward needs (see _saved).

    alpha: one-element float32 tensor, or None and r = 1 / (alpha - 1), 1 or 2.
    """
    q, k, v = _readable(q), _readable(k), _readable(v)
    out, (top, tau, lists, counts, tile_map) = heads_last(q), _saved(q)
    n, options, *_ = _options(q, r)
    _forward[(q.shape[0] * q.shape[1] * n,)](
        p_q=q, p_k=k, p_v=v, p_o=out, p_top=top, p_tau=tau, p_list=lists, p_count=counts, p_map=tile_map, p_alpha=alpha,
        scale=scale, TOLERANCE=0.0 if q.dtype == torch.float32 else 0.06, **_strides(q=q, k=k, v=v), **options,
    )  # fmt: skip
    return out, top, tau, lists, counts, tile_map


@entmax_kernels.register_fake
def _(q, k, v, alpha, r, scale):
    return heads_last(q), *_saved(q)


@torch.library.custom_op("adasplash::entmax_backward", mutates_args=())
def entmax_kernels_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, top: torch.Tensor,
    tau: torch.Tensor, lists: torch.Tensor, counts: torch.Tensor, tile_map: torch.Tensor, alpha: torch.Tensor | None,
    r: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    dout, q, k, v, out = (_readable(x) for x in (dout, q, k, v, out))
    dq, dk, dv = heads_last(q), heads_last(k), heads_last(v)
    n, _, for_queries, for_keys = _options(q, r)
    programs, delta = (q.shape[0] * q.shape[1] * n,), torch.empty_like(top)
    columns, column_counts = torch.empty_like(tile_map, dtype=torch.int16), torch.empty_like(counts)
    _columns[programs](p_map=tile_map, p_list=columns, p_count=column_counts, n_q=n, BLOCK=128, num_warps=1)
    shared = dict(p_q=q, p_k=k, p_v=v, p_do=dout, p_top=top, p_tau=tau, p_delta=delta, p_alpha=alpha, scale=scale)
    shared |= _strides(q=q, k=k, v=v, d=dout)
    for_queries |= dict(p_o=out, p_dq=dq, p_list=lists, p_count=counts, **_strides(o=out))
    _query_gradient[programs](**shared, **for_queries)
    _key_value_gradient[programs](p_dk=dk, p_dv=dv, p_list=columns, p_count=column_counts, **shared, **for_keys)
    return dq, dk, dv


@entmax_kernels_backward.register_fake
def _(dout, q, k, v, out, top, tau, lists, counts, tile_map, alpha, r, scale):
    return heads_last(q), heads_last(k), heads_last(v)


def _setup_context(ctx, inputs, output):
    q, k, v, alpha, ctx.r, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, alpha)


def _backward(ctx, dout, *_):
    *saved, alpha = ctx.saved_tensors
    return *entmax_kernels_backward(dout, *saved, alpha, ctx.r, ctx.scale), None, None, None


entmax_kernels.register_autograd(_backward, setup_context=_setup_context)
