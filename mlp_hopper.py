"""Matrix products that end with GELU or with its gradient, for Hopper GPUs, in Gluon: Triton's own lower level.

A program for each multiprocessor has three parts, in warps of their own. The loader fetches blocks of both factors,
tile after tile, into a ring of slots in shared memory. Two multipliers take every other tile each and take turns: while
the tensor cores work for one, the other applies GELU to the tile that it has in registers and stores it. (CUTLASS calls
such kernels ping-pong.) At 65,536 x 768 x 3,072 in bfloat16 on an H200 forward and backward take 0.49 and 0.59 ms. In
ordinary Triton, two programs on a multiprocessor, it was 0.54 and 0.74; cuBLAS with kernels for GELU takes 0.65 and
0.85. What is left is shared memory's bandwidth, by arithmetic: the backward moves 1.2 MB for a tile, in 9,200 cycles of
some 9,500. Fewer waits, cheaper sums over the rows, and stores straight from registers changed nothing.

Barriers flip a phase, 0 or 1, each time that they complete, and to wait for a phase is to wait for its end. Names that
begin with t_ are tensors as the copy engine takes them, s_ is shared memory. s_wide holds halves of tiles: two for each
multiplier, z and GELU(z), or in the backward three: both of z, which become GELU(z), and one of dL/dz.
"""

import torch
import triton
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

from adasplash_kernels.forward_hopper import load, make_barriers, store
from mlp import ROWS

TILE = gl.constexpr(ROWS)  # rows and columns of a tile of the product
HALF = gl.constexpr(64)  # columns of it that are finished at a time
STEP = gl.constexpr(64)  # of the inner dimension, in a slot


@gluon.jit
def _inverse(x):
    """1 / x to 2^-22, by one instruction."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _gelu(z):
    """GELU(z) and its derivative: see mlp.py."""
    square = z * z
    s = _inverse(1 + gl.exp2(z * (-2.302208198 - 0.1029432397 * square)))
    a = z * s
    return a, s + (a - a * s) * (1.5957691216 + 0.2140644489 * square)


@gluon.jit
def _load_all(tensors, buffers, barriers, n_tiles, n_columns, C, FORWARD: gl.constexpr):
    """The loader: for each tile the factors, and for the backward pass z."""
    t_x, t_weight, t_z, _, _ = tensors
    s_x, s_weight, s_wide = buffers
    full, empty, z_full, z_empty, _ = barriers
    slots: gl.constexpr = s_x.shape[0]
    step, count = 0, 0
    for i in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        row, column = i // n_columns * TILE, i % n_columns * TILE
        for k in range(0, C, STEP):
            slot = step % slots
            mbarrier.wait(empty.index(slot), step // slots & 1 ^ 1)  # the phase before the first is taken for complete
            mbarrier.expect(full.index(slot), t_x.block_type.nbytes + t_weight.block_type.nbytes)
            load(t_x, [row, k], full.index(slot), s_x.index(slot))
            if FORWARD:
                load(t_weight, [column, k], full.index(slot), s_weight.index(slot))
            else:
                load(t_weight, [k, column], full.index(slot), s_weight.index(slot))
            step += 1
        if not FORWARD:
            who = count & 1
            mbarrier.wait(z_empty.index(who), count // 2 & 1 ^ 1)
            mbarrier.expect(z_full.index(who), 2 * t_z.block_type.nbytes)
            load(t_z, [row, column], z_full.index(who), s_wide.index(3 * who))
            load(t_z, [row, column + HALF], z_full.index(who), s_wide.index(3 * who + 1))
        count += 1


@gluon.jit
def _finish(tensors, p_bias, s_z, s_a, x, row, column, W, layout: gl.constexpr):
    """z = x + bias and GELU(z), of half a tile."""
    _, _, t_z, t_a, _ = tensors
    o_w = column + gl.arange(0, HALF, gl.SliceLayout(0, layout))
    bias = gl.load(p_bias + o_w, mask=o_w < W, other=0.0).to(gl.float32)
    z = gl.convert_layout(x, layout) + gl.expand_dims(bias, 0)
    a, _ = _gelu(z)
    tma.store_wait(0)  # for what was stored from here before
    s_z.store(z.to(t_z.dtype))
    s_a.store(a.to(t_z.dtype))
    fence_async_shared()
    store(t_z, [row, column], s_z)
    store(t_a, [row, column], s_a)


@gluon.jit
def _finish_gradient(tensors, p_sums, s_z, s_dz, d, row, column, W, layout: gl.constexpr):
    """GELU(z) and dL/dz = d GELU'(z), of half a tile, and the sums of that over the rows. s_z holds z, then GELU(z)."""
    _, _, t_z, t_a, t_dz = tensors
    a, slope = _gelu(s_z.load(layout).to(gl.float32))
    dz = gl.convert_layout(d, layout) * slope
    tma.store_wait(0)
    s_z.store(a.to(t_z.dtype))
    s_dz.store(dz.to(t_z.dtype))
    fence_async_shared()
    store(t_a, [row, column], s_z)
    store(t_dz, [row, column], s_dz)
    o_w = column + gl.arange(0, HALF, gl.SliceLayout(0, layout))
    gl.store(p_sums + row // TILE * W + o_w, gl.sum(dz, 0), mask=o_w < W)


@gluon.jit
def _multiply(tensors, p_vector, buffers, barriers, n_tiles, n_columns, C, W, WHO: gl.constexpr, FORWARD: gl.constexpr):
    """A multiplier, the first or the second of the two."""
    s_x, s_weight, s_wide = buffers
    full, empty, z_full, z_empty, turn = barriers
    slots: gl.constexpr = s_x.shape[0]
    whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    steps = gl.cdiv(C, STEP)
    step, count = WHO * steps, 0  # of the loader's steps, every other tile's are for the other
    for i in range(gl.program_id(0) + WHO * gl.num_programs(0), n_tiles, 2 * gl.num_programs(0)):
        row, column = i // n_columns * TILE, i % n_columns * TILE
        product = gl.zeros([TILE, TILE], gl.float32, whole)
        mbarrier.wait(turn.index(WHO), count & 1 ^ (1 - WHO))  # the first need not wait for its first turn
        for k in range(steps):
            slot = step % slots
            mbarrier.wait(full.index(slot), step // slots & 1)
            weight = s_weight.index(slot).permute((1, 0)) if FORWARD else s_weight.index(slot)
            product = warpgroup_mma(s_x.index(slot), weight, product, is_async=True)
            product = warpgroup_mma_wait(1, deps=(product,))  # the step before is done
            mbarrier.arrive(empty.index((step + slots - 1) % slots), count=1, pred=k > 0)
            step += 1
        mbarrier.arrive(turn.index(1 - WHO), count=1)
        product = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(empty.index((step + slots - 1) % slots), count=1)
        step += steps
        left, right = gl.split(gl.permute(gl.reshape(product, [TILE, 2, HALF]), [0, 2, 1]))
        if FORWARD:
            s_z, s_a = s_wide.index(2 * WHO), s_wide.index(2 * WHO + 1)
            _finish(tensors, p_vector, s_z, s_a, left, row, column, W, half)
            _finish(tensors, p_vector, s_z, s_a, right, row, column + HALF, W, half)
        else:
            s_left, s_right, s_dz = s_wide.index(3 * WHO), s_wide.index(3 * WHO + 1), s_wide.index(3 * WHO + 2)
            mbarrier.wait(z_full.index(WHO), count & 1)
            _finish_gradient(tensors, p_vector, s_left, s_dz, left, row, column, W, half)
            _finish_gradient(tensors, p_vector, s_right, s_dz, right, row, column + HALF, W, half)
            tma.store_wait(0)
            mbarrier.arrive(z_empty.index(WHO), count=1)
        count += 1
    tma.store_wait(0)


@gluon.jit
def _product(
    t_x, t_weight, t_z, t_a, t_dz, p_vector, N, C, W, FORWARD: gl.constexpr, SLOTS: gl.constexpr
):  # fmt: skip
    """x weight^T and what follows from it: see linear_gelu. Or x weight: see linear_gelu_gradient."""
    s_x = gl.allocate_shared_memory(t_x.dtype, [SLOTS] + t_x.block_type.shape, t_x.layout)
    s_weight = gl.allocate_shared_memory(t_x.dtype, [SLOTS] + t_weight.block_type.shape, t_weight.layout)
    s_wide = gl.allocate_shared_memory(t_x.dtype, [4 if FORWARD else 6] + t_z.block_type.shape, t_z.layout)
    tensors, buffers = (t_x, t_weight, t_z, t_a, t_dz), (s_x, s_weight, s_wide)
    full, empty = make_barriers(SLOTS), make_barriers(SLOTS)
    barriers = full, empty, make_barriers(2), make_barriers(2), make_barriers(2)
    n_columns = gl.cdiv(W, TILE)
    n_tiles = gl.cdiv(N, TILE) * n_columns
    first, second = gl.constexpr(0), gl.constexpr(1)
    gl.warp_specialize(
        [
            (_multiply, (tensors, p_vector, buffers, barriers, n_tiles, n_columns, C, W, first, FORWARD)),
            (_multiply, (tensors, p_vector, buffers, barriers, n_tiles, n_columns, C, W, second, FORWARD)),
            (_load_all, (tensors, buffers, barriers, n_tiles, n_columns, C, FORWARD)),
        ],
        [4, 1],  # warps and
        [240, 24],  # registers of a thread, but for the first, which has 4 warps and what is left: 240 of 3 x 168
    )


def _launch(x, weight, z, a, dz, vector, forward):
    def tiles(tensor, *block):
        dtype = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
        layout = gl.NVMMASharedLayout.get_default_for(list(block), dtype)
        return TensorDescriptor.from_tensor(tensor, list(block), layout)

    tile, half, step = TILE.value, HALF.value, STEP.value
    n_tiles = triton.cdiv(z.shape[0], tile) * triton.cdiv(z.shape[1], tile)
    programs = min(n_tiles, torch.cuda.get_device_properties(x.device).multi_processor_count)
    block = (tile, step) if forward else (step, tile)
    slots = 5 if forward else 4  # what fits into 227 KB beside the halves of tiles that are stored and loaded
    _product[(programs,)](
        tiles(x, tile, step), tiles(weight, *block), *(tiles(tensor, tile, half) for tensor in (z, a, dz)),
        vector, z.shape[0], x.shape[1], z.shape[1], FORWARD=forward, SLOTS=slots, num_warps=4, maxnreg=168,
    )  # fmt: skip


def linear_gelu(x, weight, bias, z, a):
    """Write z = x weight^T + bias and a = GELU(z), (N, W); x (N, C), weight (W, C), bias (W).

    All are contiguous and of one 16-bit dtype, but for bias, whose is any; N > 0, C and W are multiples of 8.
    """
    _launch(x, weight, z, a, z, bias, True)


def linear_gelu_gradient(dy, weight, z, a, dz, sums):
    """Write a = GELU(z), dz = (dy weight) GELU'(z) and the sums of dz over blocks of 128 rows, (blocks, W) float32.

    dy (N, C), weight (C, W), z, a and dz (N, W): as above.
    """
    _launch(dy, weight, z, a, dz, sums, False)
