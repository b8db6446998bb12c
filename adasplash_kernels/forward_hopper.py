"""The forward of kernels.py for Hopper GPUs, in Gluon, Triton's own lower level: the same steps, which are told there.

Tiles of q, k and v are fetched by the copy engine, for which no thread computes addresses, into a ring of slots in
shared memory, ahead of their use. In the first pass and the sweeps the tensor cores begin with the scores of the next
tile as soon as those of a tile have been turned into u; in the output, when the tile's weights are on their way to
them. docs/kernels.md says what this brings.

A program counts the tiles that it fetches into the ring, over all its passes: number i goes to slot i % SLOTS, whose
barrier then completes when it is there. A barrier's phase, 0 or 1, flips each time that it completes, and to wait for a
phase is to wait for its end. Names that begin with t_ are tensors as the copy engine takes them, s_ is shared memory.
"""

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from adasplash_kernels.kernels import (
    INFINITY,
    MAX_SWEEPS,
    _above,
    _above_any,
    _any_of_16,
    _bounds,
    _guess,
    _larger,
    _marks,
    _max,
    _newton,
    _next_tau,
    _ones,
    _parameters,
    _parts,
    _powers,
    _rise,
    _rise_first,
    _store_words,
    _sums,
    _support,
    _tolerance,
    _unscaled,
    _word,
)

load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # Triton 3.6
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

LOG_SLOTS = gl.constexpr(2)
SLOTS = gl.constexpr(1 << LOG_SLOTS.value)  # the output needs 4: of two tiles, keys and values
AHEAD = gl.constexpr(SLOTS.value - 1)  # the slot that is fetched into is that of the tile before
EXACT = gl.constexpr(False)  # 16 bits only


@gluon.jit
def make_barriers(n: gl.constexpr):
    """n barriers that one arrival completes."""
    barriers = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon.jit
def _matrix(s_tile):
    """[1, 1, M, N] as [M, N]."""
    return s_tile.reshape([s_tile.shape[2], s_tile.shape[3]])


@gluon.jit
def _fetch(t_x, head, j, ring, full, number, needed):
    """Begin to load tile j of x as the program's tile of this number, if it is needed.

    All warps are through with what the slot held: each has waited for its products, and Triton puts a barrier for all
    before `expect`, as others may still look at `full`. The tests look for it in what was compiled.
    """
    slot = number & (SLOTS - 1)
    mbarrier.expect(full.index(slot), t_x.block_type.nbytes, pred=needed)
    load(t_x, [head[0], head[1], j * t_x.block_type.shape[2], 0], full.index(slot), ring.index(slot), needed)


@gluon.jit
def _arrived(ring, full, number, needed):
    """The tile of this number, when it is there; if it is not needed, whatever the slot holds, for scores not used."""
    slot = number & (SLOTS - 1)
    mbarrier.wait(full.index(slot), number >> LOG_SLOTS & 1, pred=needed)
    return _matrix(ring.index(slot))


@gluon.jit
def _listed(p_list, i, n_list):
    return gl.load(p_list + i, mask=i < n_list, other=0).to(gl.int32)


@gluon.jit
def _scores(q, s_k, b_unused):
    """Begin to compute the scores of a tile of keys; q: in registers, or in shared memory."""
    return warpgroup_mma(q, s_k.permute((1, 0)), b_unused, use_acc=False, is_async=True)


@gluon.jit
def _above_causal(b_z, o_m, o_n, top, tau, c):
    """u of a tile on the diagonal (see _above), 0 where key o_n comes after query o_m.

    In floating point, at full rate, and hidden from compilers, which would keep comparisons for the next time.
    """
    b_after, b_8 = (o_m + 1).to(gl.float32)[:, None] - (o_n & 7).to(gl.float32)[None, :], (o_n & -8).to(gl.float32)
    return gl.inline_asm_elementwise(
        "{ .reg .f32 w; sub.rn.sat.f32 w, $4, $5; fma.rn.sat.f32 $0, $1, $2, $3; mul.rn.f32 $0, $0, w; }",
        "=f,f,f,f,f,f", [b_z, c, -(top * c + tau), b_after, b_8[None, :]], gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _by_rows(x, row: gl.constexpr):
    """Sums of 8 parts of each row -> of the rows, where each thread has what it needs of them."""
    return gl.convert_layout(gl.sum(x, 1), row, assert_trivial=True)


@gluon.jit(do_not_specialize=["T", "H", "n"])
def _forward(
    t_q, t_k, t_v, t_o, p_shift, p_list, p_map, p_alpha, scale, T, H, n, R: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    TILE: gl.constexpr = t_q.block_type.shape[2]
    BD: gl.constexpr = t_q.block_type.shape[3]
    dtype: gl.constexpr = t_q.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, output, 2)
    row: gl.constexpr = gl.SliceLayout(1, scores)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i_q = n - 1 - gl.program_id(0)  # the longest rows first
    head = gl.program_id(2), gl.program_id(1)
    i_bh = head[0].to(gl.int64) * H + head[1]
    p_list += (i_bh * n + i_q) * n
    p_map += (i_bh * n + i_q) * n * (TILE // 16)
    alpha, r, c = _parameters(p_alpha, scale, R)
    o_m, o_n = gl.arange(0, TILE, row), gl.arange(0, TILE, gl.SliceLayout(0, scores))
    o_q = i_q * TILE + o_m
    # _places, in layouts that the compiler finds
    auto: gl.constexpr = gl.AutoLayout()
    places = gl.arange(0, 2, auto), gl.arange(0, 4, auto), gl.arange(0, 8, auto), gl.arange(0, TILE // 8, auto)

    own = gl.allocate_shared_memory(dtype, [2] + t_q.block_type.shape, t_q.layout)  # queries and keys of the diagonal
    ring = gl.allocate_shared_memory(dtype, [SLOTS] + t_q.block_type.shape, t_q.layout)
    full = make_barriers(SLOTS + 1)  # the last: of own
    fence_async_shared()
    mbarrier.expect(full.index(SLOTS), 2 * t_q.block_type.nbytes)
    load(t_q, [head[0], head[1], i_q * TILE, 0], full.index(SLOTS), own.index(0))
    load(t_k, [head[0], head[1], i_q * TILE, 0], full.index(SLOTS), own.index(1))
    for first in gl.static_range(AHEAD + 1):  # number i is tile i_q - 1 - i
        _fetch(t_k, head, i_q - 1 - first, ring, full, first, first < i_q)
    o_128 = gl.arange(0, 128, line)
    for start in range(0, n * (TILE // 16), 128):  # nothing has support until it is found
        b_word = gl.zeros([128], p_map.dtype.element_ty, line)
        gl.store(p_map + start + o_128, b_word, mask=start + o_128 < n * (TILE // 16))

    # The tile on the diagonal and the one before it
    s_q, s_k = _matrix(own.index(0)), _matrix(own.index(1))
    zero, b_unused = gl.zeros([TILE], gl.float32, row), gl.zeros([TILE, TILE], gl.float32, scores)
    zero_8 = tl.sum(_parts(b_unused), 1)
    mbarrier.wait(full.index(SLOTS), 0)
    b_q = s_q.load(gl.DotOperandLayout(0, scores, 2))  # in registers until the output, whose sums need these
    b_z = _scores(b_q, s_k, b_unused)
    b_y = _scores(b_q, _arrived(ring, full, 0, i_q > 0), b_unused)
    b_z, b_y = warpgroup_mma_wait(0, deps=(b_z, b_y))
    b_z = gl.where(o_m[:, None] >= o_n[None, :], b_z, -INFINITY)
    near = gl.where(i_q > 0, _max(b_y), -INFINITY)  # the first has none before it
    top, floor = _larger(_max(b_z), near), zero - 1
    beyond = gl.where(i_q > 0, 0.0, INFINITY)
    total_8, lower_8 = _sums(b_z, b_y, top, floor, beyond, c, r, R, EXACT)
    if R > 0:
        step = _newton(_by_rows(total_8, row), _by_rows(lower_8, row), alpha, R, EXACT)[1]
        floor += gl.maximum(step - 1e-6, 0.0)
        total_8, lower_8 = _sums(b_z, b_y, top, floor, beyond, c, r, R, EXACT)
    floor, most, total, lower = _rise_first(floor, _by_rows(total_8, row), _by_rows(lower_8, row), alpha, r, R, EXACT)

    # Then all others, backwards
    n_list = gl.max((((near - top) * c >= floor) & (o_q < T)).to(gl.int32), 0)
    gl.store(p_list, (i_q - 1).to(gl.int16), mask=n_list > 0)
    o_32 = gl.arange(0, 32, line)
    b_z = _scores(b_q, _arrived(ring, full, 1, i_q > 1), b_unused)
    for done in range(1, i_q, 32):
        bits = _marks(zero_8)
        top_8, total_8, lower_8 = zero_8 - INFINITY, zero_8, zero_8
        b_floor = gl.where(o_q < T, floor, INFINITY)[:, None]
        for i in range(0, gl.minimum(i_q - done, 32)):
            number = done + i
            _fetch(t_k, head, i_q - 1 - AHEAD - number, ring, full, number + AHEAD, number + AHEAD < i_q)
            b_z = warpgroup_mma_wait(0, deps=(b_z,))
            top_8 = _larger(top_8, _max(_parts(b_z)))
            b_u = _above_any(b_z, top[:, None], b_floor, c, R, EXACT)
            b_z = _scores(b_q, _arrived(ring, full, number + 1, number + 1 < i_q), b_unused)
            b_p, b_lower = _powers(b_u, r, R)
            p_8 = tl.sum(_parts(b_p), 1)
            total_8, lower_8 = total_8 + p_8, lower_8 + tl.sum(_parts(b_lower), 1)
            if R <= 0:  # where the maximum is NaN, so are the sums, and only that row is to be passed over
                p_8 = gl.where(p_8 > 0, 1.0, 0.0)
            bits |= _marks(p_8) << i
        new_top = gl.convert_layout(_max(top_8), row, assert_trivial=True)
        new_total, new_lower = _unscaled(_by_rows(total_8, row), _by_rows(lower_8, row), R, EXACT)
        top, floor, most, total, lower = _rise(
            top, floor, most, total, lower, new_top, new_total, new_lower, c, alpha, r, R, EXACT
        )
        word = _word(bits)
        p_place = p_list + (n_list + _ones(word & ((1 << o_32) - 1)))
        gl.store(p_place, (i_q - 1 - done - o_32).to(gl.int16), mask=(word >> o_32 & 1) > 0)
        n_list += _ones(word)
    b_z = warpgroup_mma_wait(0, deps=(b_z,))
    tl.debug_barrier()  # the list is read by all from here

    # Sweeps over the listed tiles and the diagonal, until tau stands
    floor, ceiling = _bounds(floor, o_q, T, alpha, R)
    tau = gl.maximum(gl.minimum(_guess(floor, total, lower, r, R, EXACT), ceiling), floor)
    tolerance: gl.constexpr = _tolerance(dtype)
    go, number = gl.to_tensor(1), i_q
    while go > 0:
        for first in gl.static_range(AHEAD):
            _fetch(t_k, head, _listed(p_list, first, n_list), ring, full, number + first, first < n_list)
        b_z = warpgroup_mma_wait(0, deps=(_scores(b_q, s_k, b_unused),))
        b_u = _above_causal(b_z, o_m, o_n, top[:, None], tau[:, None], c)
        b_z = _scores(b_q, _arrived(ring, full, number, n_list > 0), b_unused)
        b_p, b_lower = _powers(b_u, r, R)
        total_8, lower_8 = tl.sum(_parts(b_p), 1), tl.sum(_parts(b_lower), 1)
        for i in range(0, n_list):
            j = _listed(p_list, i + AHEAD, n_list)
            _fetch(t_k, head, j, ring, full, number + AHEAD, i + AHEAD < n_list)
            b_z = warpgroup_mma_wait(0, deps=(b_z,))
            b_u = _above(b_z, top[:, None], tau[:, None], c, EXACT)
            number += 1
            b_z = _scores(b_q, _arrived(ring, full, number, i + 1 < n_list), b_unused)
            b_p, b_lower = _powers(b_u, r, R)
            total_8, lower_8 = total_8 + tl.sum(_parts(b_p), 1), lower_8 + tl.sum(_parts(b_lower), 1)
        b_z = warpgroup_mma_wait(0, deps=(b_z,))
        total, lower = _by_rows(total_8, row), _by_rows(lower_8, row)
        new_tau, unsettled = _next_tau(tau, total, lower, floor, ceiling, go, tolerance, alpha, r, R, EXACT)
        moving = unsettled & (new_tau != tau) & (o_q < T)
        tau = new_tau
        go = gl.where(go < MAX_SWEEPS, go + 1, 0) * gl.max(moving.to(gl.int32), 0)

    # The output, and which groups of keys and queries have support. Values and next keys are fetched by turns
    nan = _any_of_16((top != top) & (o_q < T))  # has support, though u be 0
    j, next_j = _listed(p_list, 0, n_list), _listed(p_list, 1, n_list)
    _fetch(t_v, head, i_q, ring, full, number, True)
    _fetch(t_k, head, j, ring, full, number + 1, n_list > 0)
    _fetch(t_v, head, j, ring, full, number + 2, n_list > 0)
    _fetch(t_k, head, next_j, ring, full, number + 3, n_list > 1)
    b_z = warpgroup_mma_wait(0, deps=(_scores(s_q, s_k, b_unused),))
    b_p = _powers(_above_causal(b_z, o_m, o_n, top[:, None], tau[:, None], c), r, R)[0]
    total_8, b_o = tl.sum(_parts(b_p), 1), gl.zeros([TILE, BD], gl.float32, output)
    b_p = gl.convert_layout(b_p.to(dtype), weights)
    b_o = warpgroup_mma(b_p, _arrived(ring, full, number, True), b_o, use_acc=False, is_async=True)
    b_z = _scores(s_q, _arrived(ring, full, number + 1, n_list > 0), b_unused)
    for i in range(0, n_list):
        b_z, b_o = warpgroup_mma_wait(0, deps=(b_z, b_o))
        this_j, j, next_j = j, next_j, _listed(p_list, i + 2, n_list)
        _fetch(t_v, head, j, ring, full, number + 4, i + 1 < n_list)
        _fetch(t_k, head, next_j, ring, full, number + 5, i + 2 < n_list)
        b_p = _powers(_above(b_z, top[:, None], tau[:, None], c, EXACT), r, R)[0]
        p_8 = tl.sum(_parts(b_p), 1)
        total_8 += p_8
        words = _support(b_p, p_8, places, GROUP, EXACT)
        words |= -gl.convert_layout(nan, words.type.layout)
        o_word = gl.arange(0, TILE // 16, words.type.layout)
        _store_words(p_map + this_j * (TILE // 16) + o_word, words)
        number += 2
        b_p = gl.convert_layout(b_p.to(dtype), weights)
        b_o = warpgroup_mma(b_p, _arrived(ring, full, number, True), b_o, is_async=True)
        b_z = _scores(s_q, _arrived(ring, full, number + 1, i + 1 < n_list), b_unused)
    b_z, b_o = warpgroup_mma_wait(0, deps=(b_z, b_o))

    total = _by_rows(total_8, row)
    step = _newton(total, lower, alpha, R, EXACT)[1]
    again = _any_of_16((total > 1 + tolerance / 8) & (o_q < T)).to(gl.int64)  # for _mend, by the diagonal's word
    o_word = gl.arange(0, TILE // 16, again.type.layout)
    _store_words(p_map + i_q * (TILE // 16) + o_word, again)
    tau = gl.minimum(gl.maximum(tau + step, floor), ceiling) + top * c
    gl.store(p_shift + i_bh * n * TILE + o_q, gl.where(o_q < T, -tau, -1e30))
    s_q.store((b_o * gl.convert_layout(1 / total, gl.SliceLayout(1, output))[:, None]).to(dtype))
    fence_async_shared()
    store(t_o, [head[0], head[1], i_q * TILE, 0], own.index(0))
    tma.store_wait(0)


def forward(q, k, v, out, shift, p_list, tile_map, alpha, scale, options):
    """What _forward of kernels.py does, which takes the same as p_q and so on; options: of _options."""
    dtype = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    block = [1, 1, options["TILE"], options["BD"]]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    tiles = (TensorDescriptor.from_tensor(x, block, layout) for x in (q, k, v, out))
    constant = {name: options[name] for name in ("T", "H", "n", "R", "GROUP", "num_warps", "maxnreg")}
    grid = options["n"], q.shape[1], q.shape[0]
    _forward[grid](*tiles, shift, p_list, tile_map, alpha, scale, **constant)
