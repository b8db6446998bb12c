"""The forward of kernels.py for Hopper GPUs, in Gluon, Triton's own lower level: the same steps, which are told there.

Tiles of q, k and v are fetched by the copy engine, for which no thread computes addresses, into a ring of slots in
shared memory, ahead of their use. In the first pass and the sweeps the tensor cores begin with the scores of the next
tile as soon as those of a tile have been turned into u; in the output, when the tile's weights are on their way to
them. docs/kernels.md says what this brings.

A program counts the tiles that it fetches into the ring, over all its passes: number i goes to slot ~i % SLOTS, whose
barrier then completes when it is there (values and keys that come together have that of the first). A barrier's phase,
0 or 1, flips each time that it completes, and to wait for a phase is to wait for its end. The keys before the diagonal,
numbers -SLOTS to -1, come by one copy, together with the queries and keys of the diagonal. What is done again at the
end is fetched into the first two slots when it is needed, on the barrier that those of the diagonal had.

Names that begin with t_ are tensors as the copy engine takes them, s_ is shared memory. Of a tile, tensor cores leave
two rows to four threads, all of which then need what is known of these rows (layout `wide`). Two threads a row compute
that (layout `row`), which halves it; to convert, threads exchange a value.
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
    _even,
    _first_tau,
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
    _saturated,
    _store_words,
    _sums,
    _support,
    _tolerance,
    _unscaled,
    _word,
)

# Triton 3.6 has the second names
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
shared = gl.shared_memory_descriptor
reinterpret = shared.reinterpret if hasattr(shared, "reinterpret") else shared._reinterpret

LOG_SLOTS = gl.constexpr(2)
SLOTS = gl.constexpr(1 << LOG_SLOTS.value)  # the output needs 4: of two tiles, values and next keys
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
    slot = ~number & (SLOTS - 1)
    mbarrier.expect(full.index(slot), t_x.block_type.nbytes, pred=needed)
    load(t_x, [head[0], head[1], j * t_x.block_type.shape[2], 0], full.index(slot), ring.index(slot), needed)


@gluon.jit
def _fetch_two(t_v, t_k, head, j, next_j, ring, full, number, needed):
    """The same for values j and keys next_j, which are tiles number and number + 1 and arrive together."""
    TILE: gl.constexpr = t_v.block_type.shape[2]
    slot = ~number & (SLOTS - 1)
    mbarrier.expect(full.index(slot), 2 * t_v.block_type.nbytes, pred=needed)
    load(t_v, [head[0], head[1], j * TILE, 0], full.index(slot), ring.index(slot), needed)
    load(t_k, [head[0], head[1], next_j * TILE, 0], full.index(slot), ring.index(~(number + 1) & (SLOTS - 1)), needed)


@gluon.jit
def _tile(ring, number):
    return _matrix(ring.index(~number & (SLOTS - 1)))


@gluon.jit
def _arrived(ring, full, number, needed):
    """The tile of this number, when it is there; if it is not needed, whatever the slot holds, for scores not used."""
    mbarrier.wait(full.index(~number & (SLOTS - 1)), number >> LOG_SLOTS & 1, pred=needed)
    return _tile(ring, number)


@gluon.jit
def _listed(p_j):
    """The tile there, or whatever is there beyond the list's end, by two places at most.

    Loops move the pointer on: were it p_list + i, the compiler would count in 64 bits.
    """
    return gl.load(p_j).to(gl.int32)


@gluon.jit
def _scores(q, s_k, b_unused):
    """Begin to compute the scores of a tile of keys; q: in registers, or in shared memory."""
    return warpgroup_mma(q, s_k.permute((1, 0)), b_unused, use_acc=False, is_async=True)


@gluon.jit
def _seen(TILE: gl.constexpr):
    """Of a tile on the diagonal, by blocks of 16 by 16, [TILE / 16, 2, 8, TILE / 8, 4, 2]: whether a key is in a block
    before the query's, in that or before, and whether it does not come after the query if it is in its block.

    All is known of a thread's pairs but its warp's block and a comparison or two, so that little is left to compute.
    """
    auto: gl.constexpr = gl.AutoLayout()
    o_16, o_2, o_8 = gl.arange(0, TILE // 16, auto), gl.arange(0, 2, auto), gl.arange(0, 8, auto)
    query = o_2[None, :, None, None, None, None] * 8 + o_8[None, None, :, None, None, None]
    own = o_16[:, None, None, None, None, None]
    o_n, o_4, o_pair = gl.arange(0, TILE // 8, auto), gl.arange(0, 4, auto), gl.arange(0, 2, auto)
    key = o_4[None, None, None, None, :, None] * 2 + o_pair[None, None, None, None, None, :]
    key += (o_n & 1)[None, None, None, :, None, None] * 8
    block = (o_n >> 1)[None, None, None, :, None, None]
    return block < own, block <= own, key <= query


@gluon.jit
def _by_blocks(b_x):
    TILE: gl.constexpr = b_x.shape[0]
    return gl.reshape(b_x, [TILE // 16, 2, 8, TILE // 8, 4, 2])


@gluon.jit
def _whole(b_x, b_like):
    """_by_blocks undone."""
    return gl.convert_layout(gl.reshape(b_x, b_like.shape), b_like.type.layout, assert_trivial=True)


@gluon.jit
def _causal(b_z):
    """Scores of the tile on the diagonal, with -inf where the key comes after the query."""
    before, upto, within = _seen(b_z.shape[0])
    return _whole(gl.where(before | (upto & within), _by_blocks(b_z), -INFINITY), b_z)


@gluon.jit
def _above_causal(b_z, shift, c):
    """u of the tile on the diagonal, c z - shift, 0 where the key comes after the query."""
    before, upto, within = _seen(b_z.shape[0])
    b_less = _by_blocks(gl.broadcast(-shift, b_z)[0])
    b_less = gl.where(within, gl.where(upto, b_less, -INFINITY), gl.where(before, b_less, -INFINITY))
    return _whole(_saturated(_by_blocks(b_z), c, b_less), b_z)


@gluon.jit
def _with_2(sum_8, b_x):
    first, second = gl.split(b_x)
    sum_8 += gl.convert_layout(first, sum_8.type.layout, assert_trivial=True)
    return sum_8 + gl.convert_layout(second, sum_8.type.layout, assert_trivial=True)


@gluon.jit
def _with_4(sum_8, b_x):
    first, second = gl.split(b_x)
    return _with_2(_with_2(sum_8, first), second)


@gluon.jit
def _with(sum_8, b_x):
    """sum_8 [M, 8] and 8 parts of each row of b_x [M, 64], added one by one: products so become multiply-adds."""
    first, second = gl.split(gl.permute(gl.reshape(b_x, [b_x.shape[0], 2, 2, 2, 8]), [0, 4, 1, 2, 3]))
    return _with_4(_with_4(sum_8, first), second)


@gluon.jit
def _by_rows(x, row: gl.constexpr):
    """Sums of 8 parts of each row -> of the rows."""
    return gl.convert_layout(gl.sum(x, 1), row)


@gluon.jit
def _stepped(tau, total, lower, floor, ceiling, alpha, R: gl.constexpr):
    """tau after Newton's step, within its bounds."""
    return gl.minimum(gl.maximum(tau + _newton(total, lower, alpha, R, EXACT)[1], floor), ceiling)


@gluon.jit
def _mark(p_map, j, b_p, p_8, places, nan, GROUP: gl.constexpr):
    """Tell the map which groups of tile j have support (see _support): all, of 16 rows with NaN."""
    words = _support(b_p, p_8, places, GROUP, EXACT)
    words |= -gl.convert_layout(nan, words.type.layout)
    o_word = gl.arange(0, b_p.shape[0] // 16, words.type.layout)
    _store_words(p_map + j * (b_p.shape[0] // 16) + o_word, words)


@gluon.jit
def _finish(t_o, head, i_q, s_o, b_o, total, p_shift, tau, new_tau, top, c, o_q, T):
    """Begin to store the output, and store tau for the backward (see _saved): the new one, unless it is smaller, as no
    key with support is to be off the map."""
    layout: gl.constexpr = gl.SliceLayout(1, b_o.type.layout)
    _matrix(s_o).store((b_o * gl.convert_layout(1 / total, layout)[:, None]).to(t_o.dtype))
    fence_async_shared()
    store(t_o, [head[0], head[1], i_q * t_o.block_type.shape[2], 0], s_o)
    gl.store(p_shift, gl.where(o_q < T, -(gl.maximum(tau, new_tau) + top * c), -1e30))


@gluon.jit
def _stored():
    """Wait until what the copy engine stores is in memory, as what it stores next may overtake it.

    tma.store_wait waits until it has been read.
    """
    tl.inline_asm_elementwise("cp.async.bulk.wait_group 0; mov.b32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1)


@gluon.jit(do_not_specialize=["T", "H", "n"])
def _forward(
    t_q, t_k, t_before, t_v, t_o, p_shift, p_list, p_map, p_alpha, scale, T, H, n, R: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    TILE: gl.constexpr = t_q.block_type.shape[2]
    BD: gl.constexpr = t_q.block_type.shape[3]
    dtype: gl.constexpr = t_q.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BD, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, output, 2)
    wide: gl.constexpr = gl.SliceLayout(1, scores)  # two rows a thread, as tiles need them
    row: gl.constexpr = gl.DistributedLinearLayout([], [[0], [8], [1], [2], [4]], [[16], [32]], [], [TILE])  # one
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i_q = n - 1 - gl.program_id(0)  # the longest rows first
    head = gl.program_id(2), gl.program_id(1)
    i_bh = head[0].to(gl.int64) * H + head[1]
    p_list += (i_bh * n + i_q) * n
    p_map += (i_bh * n + i_q) * n * (TILE // 16)
    alpha, r, c = _parameters(p_alpha, scale, R)
    o_q = i_q * TILE + gl.arange(0, TILE, row)
    # _places, in layouts that the compiler finds
    auto: gl.constexpr = gl.AutoLayout()
    places = gl.arange(0, 2, auto), gl.arange(0, 4, auto), gl.arange(0, 8, auto), gl.arange(0, TILE // 8, auto)

    # queries and keys of the diagonal; in the place of these, later, the output
    own = gl.allocate_shared_memory(dtype, [2] + t_q.block_type.shape, t_q.layout)
    ring = gl.allocate_shared_memory(dtype, [SLOTS] + t_q.block_type.shape, t_q.layout)
    full = make_barriers(SLOTS + 1)  # the last: of what is loaded first, and of what is done again
    fence_async_shared()
    mbarrier.expect(full.index(SLOTS), t_q.block_type.nbytes + t_k.block_type.nbytes + t_before.block_type.nbytes)
    load(t_q, [head[0], head[1], i_q * TILE, 0], full.index(SLOTS), own.index(0))
    load(t_k, [head[0], head[1], i_q * TILE, 0], full.index(SLOTS), own.index(1))
    slots = reinterpret(ring, dtype, t_before.block_type.shape, t_before.layout)
    load(t_before, [head[0], head[1], (i_q - SLOTS) * TILE, 0], full.index(SLOTS), slots)
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
    b_z, b_y = _scores(b_q, s_k, b_unused), _scores(b_q, _tile(ring, -SLOTS), b_unused)
    b_z, b_y = warpgroup_mma_wait(0, deps=(b_z, b_y))
    b_z = _causal(b_z)
    near = gl.where(i_q > 0, gl.convert_layout(_max(b_y), row), -INFINITY)  # the first has none before it
    top, tau = _larger(gl.convert_layout(_max(b_z), row), near), zero - 1
    beyond = gl.where(i_q > 0, 0.0, INFINITY)
    if R > 0:
        b_even, b_even_y = _even(b_z), _even(b_y)
        shift = gl.convert_layout(top * c + tau, gl.SliceLayout(1, b_even.type.layout))[:, None]
        total_8, _ = _sums(b_even, b_even_y, 0.0, shift, beyond, c, r, R, EXACT)
        tau = _first_tau(_by_rows(total_8, row), alpha, R)
    shift = gl.convert_layout(top * c + tau, wide)[:, None]
    total_8, lower_8 = _sums(b_z, b_y, 0.0, shift, beyond, c, r, R, EXACT)
    total, lower = _by_rows(total_8, row), _by_rows(lower_8, row)
    floor, most, total, lower = _rise_first(tau, total, lower, 2 * TILE, alpha, r, R, EXACT)

    # Then all others, backwards. Bit i of `bits`: whether tile i_q - done - i is to be listed
    listed = gl.where(((near - top) * c >= floor) & (o_q < T), 1.0, 0.0)
    n_list = gl.where(i_q == 1, 1, 0)  # the second block has but one before it, and does not ask
    gl.store(p_list, gl.to_tensor(0).to(gl.int16), mask=i_q == 1)
    o_32 = gl.arange(0, 32, line)
    single = i_q - SLOTS  # as many are fetched one by one
    b_z = _scores(b_q, _tile(ring, 1 - SLOTS), b_unused)
    for done in range(1, i_q, 31):
        bits = _marks(zero_8 + gl.convert_layout(listed, gl.SliceLayout(1, zero_8.type.layout))[:, None])
        listed = zero
        top_8, total_8, lower_8 = zero_8 - INFINITY, zero_8, zero_8
        shift = gl.convert_layout(gl.where(o_q < T, top * c + floor, INFINITY), wide)[:, None]
        for i in range(1, gl.minimum(i_q - done, 31) + 1):
            number = done + i - 1 - SLOTS
            s_next = _arrived(ring, full, number + 1, (number + 1 >= 0) & (number + 1 < single))
            b_z = warpgroup_mma_wait(0, deps=(b_z,))
            top_8 = _larger(top_8, _max(_parts(b_z)))
            b_u = _above_any(b_z, 0.0, shift, c, R, EXACT)
            b_z = _scores(b_q, s_next, b_unused)
            j = single - 1 - AHEAD - number
            _fetch(t_k, head, j, ring, full, number + AHEAD, j >= 0)
            b_p, b_lower = _powers(b_u, r, R)
            more_8 = tl.sum(_parts(b_lower), 1)
            total_8, lower_8 = _with(total_8, b_p), lower_8 + more_8
            if R <= 0:  # where the maximum is NaN, so are the sums, and only that row is to be passed over
                more_8 = gl.where(more_8 > 0, 1.0, 0.0)
            bits |= _marks(more_8) << i
        new_top = gl.convert_layout(_max(top_8), row)
        new_total, new_lower = _unscaled(_by_rows(total_8, row), _by_rows(lower_8, row), R, EXACT)
        top, floor, most, total, lower = _rise(
            top, floor, most, total, lower, new_top, new_total, new_lower, c, alpha, r, R, EXACT
        )
        word = _word(bits)
        p_place = p_list + (n_list + _ones(word & ((1 << o_32) - 1)))
        gl.store(p_place, (i_q - done - o_32).to(gl.int16), mask=(word >> o_32 & 1) > 0)
        n_list += _ones(word)
    b_z = warpgroup_mma_wait(0, deps=(b_z,))
    tl.debug_barrier()  # the list is read by all from here

    # Sweeps over the listed tiles and the diagonal, until tau stands
    floor, ceiling = _bounds(floor, o_q, T, alpha, R)
    tau = gl.maximum(gl.minimum(_guess(floor, total, lower, r, R, EXACT), ceiling), floor)
    tolerance: gl.constexpr = _tolerance(dtype)
    go, number = gl.to_tensor(1), gl.maximum(single, 0)
    while go > 0:
        for first in gl.static_range(AHEAD):
            _fetch(t_k, head, _listed(p_list + first), ring, full, number + first, first < n_list)
        shift = gl.convert_layout(top * c + tau, wide)[:, None]
        b_z = warpgroup_mma_wait(0, deps=(_scores(b_q, s_k, b_unused),))
        b_u = _above_causal(b_z, shift, c)
        b_z = _scores(b_q, _arrived(ring, full, number, n_list > 0), b_unused)
        b_p, b_lower = _powers(b_u, r, R)
        total_8, lower_8 = tl.sum(_parts(b_p), 1), tl.sum(_parts(b_lower), 1)
        p_j = p_list + AHEAD
        for i in range(0, n_list):
            j, p_j = _listed(p_j), p_j + 1
            s_next = _arrived(ring, full, number + 1, i + 1 < n_list)
            b_z = warpgroup_mma_wait(0, deps=(b_z,))
            b_u = _above(b_z, 0.0, shift, c, EXACT)
            b_z = _scores(b_q, s_next, b_unused)
            _fetch(t_k, head, j, ring, full, number + AHEAD, i + AHEAD < n_list)
            number += 1
            b_p, b_lower = _powers(b_u, r, R)
            total_8, lower_8 = _with(total_8, b_p), lower_8 + tl.sum(_parts(b_lower), 1)
        b_z = warpgroup_mma_wait(0, deps=(b_z,))
        total, lower = _by_rows(total_8, row), _by_rows(lower_8, row)
        new_tau, unsettled = _next_tau(tau, total, lower, floor, ceiling, go, tolerance, alpha, r, R, EXACT)
        moving = unsettled & (new_tau != tau) & (o_q < T)
        tau = new_tau
        go = gl.where(go < MAX_SWEEPS, go + 1, 0) * gl.max(moving.to(gl.int32), 0)

    # The output, and which groups of keys and queries have support. Values come with the keys that are next
    nan = _any_of_16((top != top) & (o_q < T))  # has support, though u be 0
    j, next_j, p_j = _listed(p_list), _listed(p_list + 1), p_list + 2
    _fetch_two(t_v, t_k, head, i_q, j, ring, full, number, True)
    _fetch_two(t_v, t_k, head, j, next_j, ring, full, number + 2, n_list > 0)
    shift = gl.convert_layout(top * c + tau, wide)[:, None]
    b_z = warpgroup_mma_wait(0, deps=(_scores(s_q, s_k, b_unused),))
    b_p = _powers(_above_causal(b_z, shift, c), r, R)[0]
    total_8, b_o = tl.sum(_parts(b_p), 1), gl.zeros([TILE, BD], gl.float32, output)
    b_p = gl.convert_layout(b_p.to(dtype), weights)
    b_o = warpgroup_mma(b_p, _arrived(ring, full, number, True), b_o, use_acc=False, is_async=True)
    b_z = _scores(s_q, _tile(ring, number + 1), b_unused)
    for i in range(0, n_list):
        number += 2
        s_v = _arrived(ring, full, number, True)
        b_z, b_o = warpgroup_mma_wait(0, deps=(b_z, b_o))
        this_j, j, next_j, p_j = j, next_j, _listed(p_j), p_j + 1
        _fetch_two(t_v, t_k, head, j, next_j, ring, full, number + 2, i + 1 < n_list)
        b_p = _powers(_above(b_z, 0.0, shift, c, EXACT), r, R)[0]
        p_8 = tl.sum(_parts(b_p), 1)
        total_8 += p_8
        _mark(p_map, this_j, b_p, p_8, places, nan, GROUP)
        b_p = gl.convert_layout(b_p.to(dtype), weights)
        b_o = warpgroup_mma(b_p, s_v, b_o, is_async=True)
        b_z = _scores(s_q, _tile(ring, number + 1), b_unused)
    b_z, b_o = warpgroup_mma_wait(0, deps=(b_z, b_o))

    total = _by_rows(total_8, row)
    new_tau = _stepped(tau, total, lower, floor, ceiling, alpha, R)
    p_shift += i_bh * n * TILE + o_q
    _finish(t_o, head, i_q, own.index(1), b_o, total, p_shift, tau, new_tau, top, c, o_q, T)

    # Where the last step has let in many keys from just below tau, which is rare: again, until the sums are 1
    unsettled = (gl.abs(total - 1) > 2e-4) & (total > 0) & (o_q < T)
    go, phase = gl.max((unsettled & (total > 1 + tolerance / 8)).to(gl.int32), 0), gl.to_tensor(1)
    while go > 0:
        tau = gl.where(unsettled, new_tau, tau)
        shift = gl.convert_layout(top * c + tau, wide)[:, None]
        total_8, lower_8, b_o = zero_8, zero_8, gl.zeros([TILE, BD], gl.float32, output)
        _stored()
        for i in range(-1, n_list):
            j = gl.where(i < 0, i_q, _listed(p_list + gl.maximum(i, 0)))
            mbarrier.expect(full.index(SLOTS), t_k.block_type.nbytes + t_v.block_type.nbytes)
            load(t_k, [head[0], head[1], j * TILE, 0], full.index(SLOTS), ring.index(0))
            load(t_v, [head[0], head[1], j * TILE, 0], full.index(SLOTS), ring.index(1))
            mbarrier.wait(full.index(SLOTS), phase)
            phase ^= 1
            b_z = warpgroup_mma_wait(0, deps=(_scores(s_q, _matrix(ring.index(0)), b_unused),))
            key = j * TILE + gl.arange(0, TILE, gl.SliceLayout(0, scores))
            b_z = gl.where(gl.convert_layout(o_q, wide)[:, None] >= key[None, :], b_z, -INFINITY)
            b_p, b_lower = _powers(_above(b_z, 0.0, shift, c, EXACT), r, R)
            p_8 = tl.sum(_parts(b_p), 1)
            total_8, lower_8 = total_8 + p_8, lower_8 + tl.sum(_parts(b_lower), 1)
            _mark(p_map, j, b_p, p_8, places, nan, GROUP)
            b_p = gl.convert_layout(b_p.to(dtype), weights)
            b_o = warpgroup_mma_wait(0, deps=(warpgroup_mma(b_p, _matrix(ring.index(1)), b_o, is_async=True),))
        total, lower = _by_rows(total_8, row), _by_rows(lower_8, row)
        new_tau = _stepped(tau, total, lower, floor, ceiling, alpha, R)
        _finish(t_o, head, i_q, own.index(1), b_o, total, p_shift, tau, new_tau, top, c, o_q, T)
        unsettled = (gl.abs(total - 1) > 2e-4) & (new_tau != tau) & (total > 0) & (o_q < T)
        go = gl.where(go < MAX_SWEEPS, go + 1, 0) * gl.max(unsettled.to(gl.int32), 0)
    tma.store_wait(0)


def forward(q, k, v, out, shift, p_list, tile_map, alpha, scale, options):
    """What _forward of kernels.py does, which takes the same as p_q and so on; options: of _options."""
    dtype, (TILE, BD) = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16, (options["TILE"], options["BD"])

    def tiles(x, n=1):
        block = [1, 1, n * TILE, BD]
        return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, dtype))

    constant = {name: options[name] for name in ("T", "H", "n", "R", "GROUP", "num_warps", "maxnreg")}
    grid = options["n"], q.shape[1], q.shape[0]
    before = tiles(k, SLOTS.value)
    _forward[grid](tiles(q), tiles(k), before, tiles(v), tiles(out), shift, p_list, tile_map, alpha, scale, **constant)
