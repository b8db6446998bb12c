"""Entmax attention against float64: python -m pytest tests/test_adasplash_kernels.py (add -m gpu on a CUDA machine)."""

import ast
import itertools
import math
import os
import random
import re
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, CompileForHopper, compile_in_a_process, run_in_interpreter

from adasplash_kernels import _operator, causal_entmax_attention, causal_entmax_attention_qkvpacked

# -----------------------------------------------------------------------------
# what is right: the dense formulas


def dense_entmax(s, alpha):
    """Rows of s (-inf where masked) -> (p, p^(2 - alpha) on the support, tau); float64 bisection to the last bit."""
    s = (alpha - 1) * s
    top = s.amax(-1, keepdim=True)
    low, high = top - 1, top
    for _ in range(100):
        tau = (low + high) / 2
        less = ((s - tau).clamp_min(0) ** (1 / (alpha - 1))).sum(-1, keepdim=True) < 1
        low, high = torch.where(less, low, tau), torch.where(less, tau, high)
    u = (s - low).clamp_min(0)
    p = u ** (1 / (alpha - 1))
    p = p / p.sum(-1, keepdim=True)
    return p, torch.where(p > 0, p ** (2 - alpha), 0), low


def dense_scores(q, k, scale):
    R, T = q.shape[2], k.shape[2]
    mask = torch.ones(R, T, dtype=torch.bool, device=q.device).tril(T - R)
    return (q @ k.mT * scale).masked_fill(~mask, -math.inf)


def dense(q, k, v, dout, alpha, scale):
    """out, dq, dk, dv in the dtype of the arguments, but the entmax itself in float64."""
    p, u, _ = dense_entmax(dense_scores(q, k, scale).double(), alpha)
    p, u = p.to(q.dtype), u.to(q.dtype)
    dp = dout @ v.mT
    ds = u * (dp - (u * dp).sum(-1, keepdim=True) / u.sum(-1, keepdim=True))
    return p @ v, scale * ds @ k, scale * ds.mT @ q, p.mT @ dout


def run(q, k, v, dout, alpha, scale=None):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = causal_entmax_attention(q, k, v, alpha, scale)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def run_packed(q, k, v, dout, alpha, scale=None):
    qkv = torch.stack((q, k, v)).permute(1, 3, 0, 2, 4).contiguous().requires_grad_()
    out = causal_entmax_attention_qkvpacked(qkv, alpha, scale)
    return out.detach(), *torch.autograd.grad(out, qkv, dout)[0].permute(2, 0, 3, 1, 4)


def error(x, y, floor=1e-30):
    """The Frobenius error of x relative to y, or to `floor` where y is smaller."""
    return ((x.double() - y.double()).norm() / y.double().norm().clamp_min(floor)).item()


def summands(q, k, v, dout, alpha, scale):
    """The norms of out, dq, dk, dv if all their summands were positive: rounding is relative to these."""
    p, u, _ = dense_entmax(dense_scores(q, k, scale), alpha)
    q, k, v, dout = q.abs(), k.abs(), v.abs(), dout.abs()
    ds = scale * u * (dout @ v.mT)
    return [x.norm().item() for x in (p @ v, ds @ k, ds.mT @ q, p.mT @ dout)]


def check(q, k, v, dout, alpha, scale=None):
    """The accuracy that is promised, of out, dq, dk and dv; where these cancel to less than 1% of their summands, of
    that 1%."""
    scale = scale or q.shape[3] ** -0.5
    q64, k64, v64 = q.double(), k.double(), v.double()
    s = dense_scores(q64, k64, scale)
    if alpha > 1.5:  # the gradient jumps where a key enters the support: leave out the rows that are just there
        _, _, tau = dense_entmax(s, alpha)
        near = (((alpha - 1) * s - tau).abs() < 1e-5).any(-1, keepdim=True)
        dout = dout.masked_fill(near, 0)
    expected = dense(q64, k64, v64, dout.double(), alpha, scale)
    got = run(q, k, v, dout, alpha, scale)
    if q.dtype == torch.float32:
        limits = [1e-5 if alpha in (1.5, 2) else 5e-5] * 4
    else:  # no worse than 1.5 times the dense formula in that precision, where that rounds at all
        rounded = dense(q, k, v, dout, alpha, scale)
        limits = [max(1e-5, 1.5 * error(x, y)) for x, y in zip(rounded, expected, strict=True)]
    floors = [0.01 * size for size in summands(q64, k64, v64, dout.double(), alpha, scale)]
    for name, x, y, floor, limit in zip(("out", "dq", "dk", "dv"), got, expected, floors, limits, strict=True):
        assert x.dtype == q.dtype
        assert error(x, y, floor) <= limit, f"{name}: {error(x, y, floor):.2e} > {limit:.2e}"


def normal_inputs(B, H, R, T, D, seed=0, dtype=torch.float32, device="cpu", spread=1.0):
    """Gaussian q, k, v, dout; spread times as peaked as a fresh model's."""
    g = torch.Generator().manual_seed(seed)
    q, k, v, dout = (torch.randn(B, H, n, D, generator=g) for n in (R, T, T, R))
    return [x.to(device, dtype) for x in (spread * q, k, v, dout)]


def exact_inputs(scores, offset=0.0, D=16, dtype=torch.float32, device="cpu"):
    """q, k, v, dout whose scores with scale = 1 are offset + scores (T,) in every row, without any rounding."""
    q, k, v, dout = normal_inputs(1, 1, len(scores), len(scores), D, seed=1)
    q[..., 0], k[..., 0] = offset, 1
    q[..., 1], k[..., 1] = 1, scores
    q[..., 2:] = 0
    return [x.to(device, dtype) for x in (q, k, v, 0.1 * dout)]  # so that float16 holds dk


def clustered_inputs(H, T, seed, dtype, device="cpu"):
    """q, k, v whose rows have, with scale = 1 and alpha = 1.5, a few keys above and all others together below their
    threshold, by up to 0.1 and within 0.003 (of u): v adds up the weights of the former and of the latter."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.zeros(3, 1, H, T, 16)
    q[..., :2] = 1
    for h in range(H):
        n = int(torch.randint(2, 9, (), generator=g))
        above = -torch.rand(n, generator=g)
        above[0] = 0
        tau = dense_entmax(above[None].double(), 1.5)[2].float()[0]
        below = tau - 0.1 * torch.rand(1, generator=g) - 0.003 * torch.rand(T - n, generator=g)
        order = torch.randperm(T, generator=g)
        scores = torch.cat((above, 2 * below))[order]
        k[0, h, :, 0] = (32 * scores).round() / 32  # in two parts, which 16 bits hold
        k[0, h, :, 1] = scores - k[0, h, :, 0]
        v[0, h, :, 0], v[0, h, :, 1] = order < n, order >= n
    return [x.to(device, dtype) for x in (q, k, v)]


def clustered_error(H, T, seed, dtype, device="cpu"):
    """The largest error of a row's weights, above and below."""
    q, k, v = clustered_inputs(H, T, seed, dtype, device)
    p, *_ = dense_entmax(dense_scores(q.double(), k.double(), 1.0), 1.5)
    return (causal_entmax_attention(q, k, v, 1.5, 1.0).double() - p @ v.double()).abs().max().item()


EXTREMES = {
    "equal": (torch.zeros(40),),
    "dominating": (torch.tensor([0.0, 50.0] + [0.0] * 38),),
    "wide": (torch.linspace(-1e4, 1e4, 40).round(),),
    "high": (torch.arange(40) % 7 / 8, 1e4),
    "low": (torch.arange(40) % 7 / 8, -1e4),
    "tiny": (1e-6 * torch.randn(40, generator=torch.Generator().manual_seed(0)),),
}


# -----------------------------------------------------------------------------
# the reference, on the CPU


ALPHAS = (1.01, 1.1, 1.25, 1.5, 1.75, 2.0)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("T, D", [(1, 16), (2, 8), (63, 20), (130, 64)])
def test_accuracy(T, D, alpha):
    for seed, spread in enumerate((0.3, 1.0, 5.0)):
        check(*normal_inputs(2, 3, T, T, D, seed=T + seed, spread=spread), alpha)


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_blocks_of_queries(alpha):
    check(*normal_inputs(2, 2, 700, 700, 16), alpha)


@pytest.mark.parametrize("alpha", (1.0, 1.25, 1.5, 2.0))
def test_last_queries(alpha):
    q, k, v, _ = normal_inputs(2, 2, 37, 37, 16)
    whole = causal_entmax_attention(q, k, v, alpha)
    for R in (1, 5, 36):
        last = causal_entmax_attention(q[:, :, -R:], k, v, alpha)
        assert error(last, whole[:, :, -R:]) < 1e-6


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_half_precision(dtype, alpha):
    check(*normal_inputs(2, 2, 100, 100, 32, dtype=dtype), alpha)


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_matches_entmax_package(alpha):
    entmax = pytest.importorskip("entmax")
    q, k, v, dout = (x.requires_grad_() for x in normal_inputs(1, 2, 50, 50, 16))
    rows = {1.5: entmax.entmax15, 2.0: entmax.sparsemax}
    s = dense_scores(q, k, 0.25)
    p = rows[alpha](s, dim=-1) if alpha in rows else entmax.entmax_bisect(s, alpha, dim=-1)
    for x, y in zip(torch.autograd.grad(p @ v, (q, k, v), dout), run(q, k, v, dout, alpha)[1:], strict=True):
        assert error(y, x) < (1e-5 if alpha in rows else 5e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scores", EXTREMES)
def test_extreme_scores(scores, alpha):
    for dtype in (torch.float32, torch.float16):  # Triton's interpreter cuts bfloat16 off instead of rounding
        check(*exact_inputs(*EXTREMES[scores], dtype=dtype), alpha, scale=1.0)


@pytest.mark.parametrize("place", (160, 161))
@pytest.mark.parametrize("n_far", (1, 40))
@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_far_keys_that_take_from_a_near_one(alpha, n_far, place):
    """That had all the weight before. In an even place it counts twice in the first guess, which is too high then."""
    scores = torch.full((200,), -30.0)
    scores[place] = 0
    scores[:n_far] = -torch.linspace(0.7, 0.9, n_far) / (alpha - 1)
    check(*exact_inputs(scores), alpha, scale=1.0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_rows_sum_to_one(alpha):
    q, k, _, _ = normal_inputs(2, 2, 90, 90, 16)
    out = causal_entmax_attention(q, k, torch.ones_like(k), alpha)
    torch.testing.assert_close(out, torch.ones_like(out), atol=2e-6, rtol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_one_key_has_no_gradient(alpha):
    _, dq, dk, _ = run(*normal_inputs(2, 2, 1, 1, 16), alpha)
    assert not dq.any() and not dk.any()


def check_support(dtype, alpha, T, device):
    """The map that the backward goes by has all groups that have u > 1e-5 in float64, and leaves some out."""
    from adasplash_kernels import kernels

    tile, n, r = 64, -(-T // 64), {1.5: 2, 2.0: 1}.get(alpha, 0)
    group = kernels._options(torch.empty(1, 3, T, 16, dtype=dtype), r)[1]["GROUP"]
    q, k, v, _ = normal_inputs(1, 3, T, T, 16, seed=1, spread=8)
    k *= torch.rand(1, 3, T, 1, generator=torch.Generator().manual_seed(0)) ** 2  # some keys are large, some small
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    *_, tile_map = kernels.entmax_kernels(q, k, v, None if r else torch.tensor([alpha], device=device), r, 0.25)
    tile_map = tile_map.cpu()
    bits = (tile_map[..., None].long() >> torch.arange((tile + 16) // group)) & 1  # (H, n, n, tile / 16, bits)
    p = dense_entmax(dense_scores(q.double(), k.double(), 0.25)[0], alpha)[0].cpu()
    support = F.pad(p ** (alpha - 1) > 1e-5, (0, n * tile - T, 0, n * tile - T))
    support = support.view(3, n, tile // group, group, n, tile // group, group)
    below = torch.ones(n, n, dtype=torch.bool).tril(-1)
    keys, queries = bits[..., : tile // group].amax(3), bits[..., tile // group :].flatten(3)
    for marked, expected in ((keys, support.any(3).any(2).any(-1)), (queries, support.any(-1).any(-1).any(3).mT)):
        assert not (expected & ~marked.bool())[:, below].any()
        assert marked[:, below].float().mean() < 0.9


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="is about the kernels")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_tiles_with_support_are_visited(dtype, alpha):
    check_support(dtype, alpha, 300, "cpu")


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="is about the kernels")
@pytest.mark.parametrize("group", (2, 8, 16))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_lists_of_what_is_visited(group, dtype, monkeypatch):
    """All groups of the map once, then different ones without support up to a whole block, of the right side."""
    from adasplash_kernels import kernels

    monkeypatch.setattr(kernels, "LONGEST", {group: 1 << 20})
    q, k, v, _ = (x.to(dtype) for x in normal_inputs(1, 2, 300, 300, 16, seed=2, spread=8))
    tile_map = kernels.entmax_kernels(q, k, v, None, 2, 0.25)[3]
    n, WORDS = tile_map.shape[2:]
    groups = 16 * WORDS // group
    lists, counts = torch.full((2, 2, n, n * groups), -1, dtype=torch.int16), torch.empty(2, 2, n, dtype=torch.int32)
    kernels._lists[2 * n, 2](tile_map, lists, counts, n, WORDS, groups, num_warps=1)
    bits = (tile_map[..., None].long() >> torch.arange(groups + 16 // group)) & 1
    keys, queries = bits[..., :groups].amax(3), bits[..., groups:].flatten(3)
    for side, marked in ((0, keys), (1, queries.transpose(1, 2))):
        for head in range(2):
            for line in range(n):
                first, last = (0, line) if side == 0 else (line + 1, n)
                marks = marked[head, line, first:last].flatten()
                expected, count = marks.nonzero().flatten() + first * groups, counts[side, head, line]
                listed = lists[side, head, line, : -(-int(count) // groups) * groups].tolist()
                assert listed[:count] == expected.tolist()
                assert len(set(listed)) == len(listed) and all(first * groups <= x < last * groups for x in listed)


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="is about the kernels")
@pytest.mark.parametrize("group", (8, 16))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_groups_of_long_sequences_visited(group, dtype, monkeypatch):
    """The larger groups, which only long sequences have, on short ones with much support and with little."""
    from adasplash_kernels import kernels

    monkeypatch.setattr(kernels, "LONGEST", {group: 1 << 20})
    for spread in (0.3, 8):
        check(*normal_inputs(1, 2, 150, 150, 16, 2, dtype, spread=spread), 1.5)


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="is about the kernels")
@pytest.mark.parametrize("T", (128, 191, 200))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_blocks_of_which_all_has_support_are_visited(dtype, T, monkeypatch):
    """And if they are whole, without their lists."""
    from adasplash_kernels import kernels

    lists = kernels._lists

    def without_lists(tile_map, p_list, p_count, *args, **options):
        lists[p_count.shape[1], 2](tile_map, p_list, p_count, *args, **options)
        p_list.zero_()

    inputs = normal_inputs(1, 2, T, T, 16, 2, dtype, spread=0.05)
    check(*inputs, 1.5)
    if T == 128:
        monkeypatch.setattr(kernels, "_lists", defaultdict(lambda: without_lists))
        check(*inputs, 1.5)


@pytest.mark.parametrize("seed", (2, 12))
def test_half_precision_of_keys_just_below_the_threshold(seed):
    assert clustered_error(4, 160, seed, torch.bfloat16) < 0.025
    assert clustered_error(4, 160, seed, torch.float16) < 0.002
    q, k, v = clustered_inputs(4, 160, seed, torch.bfloat16)
    if "TRITON_INTERPRET" in os.environ:  # some rows are indeed done again
        tile_map = _operator(q, k)(q, k, v, None, 2, 1.0)[3]
        assert tile_map.diagonal(dim1=1, dim2=2).any()
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(0)).to(q.dtype)
    expected = dense(q.double(), k.double(), v.double(), dout.double(), 1.5, 1.0)
    for x, y in zip(run(q, k, v, dout, 1.5, 1.0), expected, strict=True):
        assert error(x, y) < 0.02


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_nan_in_nan_out(alpha):
    for dtype in (torch.float32, torch.bfloat16):
        for which in range(3):
            inputs = normal_inputs(1, 2, 70, 70, 16, dtype=dtype)
            inputs[which][0, 1, 20] = math.nan
            out, *gradients = run(*inputs, alpha)
            assert out[0, 1, 20].isnan().all() and gradients[0][0, 1, 20].isnan().all()
            assert not any(x[0, 0].isnan().any() for x in (out, *gradients))


def test_alpha_one_is_softmax():
    q, k, v, _ = normal_inputs(2, 2, 33, 33, 16)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for alpha in (1, 1 + 1e-9, 1.000009):
        torch.testing.assert_close(causal_entmax_attention(q, k, v, alpha), expected)


@pytest.mark.parametrize("alpha", (1.00005, 1.0005, 1.005))
def test_alpha_near_one(alpha):
    """As far as float32 goes: rounding counts 1 / (alpha - 1) times."""
    for T, spread in ((1, 1.0), (63, 0.3), (200, 5.0)):
        q, k, v, dout = normal_inputs(1, 2, T, T, 16, spread=spread)
        inputs64 = [x.double() for x in (q, k, v, dout)]
        expected, sizes = dense(*inputs64, alpha, 0.25), summands(*inputs64, alpha, 0.25)
        for x, y, size in zip(run(q, k, v, dout, alpha), expected, sizes, strict=True):
            assert error(x, y, 0.01 * size) < torch.finfo(torch.float32).eps / (alpha - 1)


def test_alpha_as_tensor():
    inputs = normal_inputs(2, 2, 50, 50, 16)
    for alpha in (1.3, 1.5, 2.0):
        for x, y in zip(run(*inputs, torch.tensor([alpha])), run(*inputs, alpha), strict=True):
            assert error(x, y) < 1e-5


def test_wrong_arguments():
    q, k, v, _ = normal_inputs(1, 2, 8, 8, 16)
    for args, error_type, words in [
        ((q[0], k, v), ValueError, r"got q \(2, 8, 16\)"),
        ((q, k[:, :, :5], v[:, :, :5]), ValueError, "R <= T"),
        ((q, k, v[..., :8]), ValueError, "got q"),
        ((q[:, :, :0], k, v), ValueError, "got q"),
        ((q.half(), k, v), TypeError, "float16"),
        ((q.int(), k.int(), v.int()), TypeError, "int32"),
        ((q, k.to("meta"), v), TypeError, "meta"),
        ((q, k, v, 0.9), ValueError, "0.9"),
        ((q, k, v, 3), ValueError, "3"),
        ((q, k, v, math.nan), ValueError, "nan"),
        ((q, k, v, torch.tensor([1.2, 1.3])), TypeError, "alpha"),
        ((q, k, v, torch.tensor([1.2], requires_grad=True)), ValueError, "alpha"),
        ((q, k, v, 1.5, -1.0), ValueError, "scale"),
    ]:
        with pytest.raises(error_type, match=words):
            causal_entmax_attention(*args)


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="is the interpreter run")
def test_kernels_in_the_interpreter():
    """The tests above again, small, in a process where CPU tensors go to the kernels."""
    chosen = "half or extreme or nan or one_key or alpha or sum or same_bits or opcheck or visited or strides or second"
    run_in_interpreter(__file__, f"{chosen} or 63-20-1.5 or 63-20-1.25")


def scattered_reductions(ir):
    """The reductions in a kernel's IR over lanes that are not neighbours: Triton 3.6 silently loses values in these."""
    layouts = re.findall(r"^(#\w+) = #ttg\.linear<.*?lane = (\[\[.*?\]\]), warp", ir, re.MULTILINE)
    lanes_of = {name: ast.literal_eval(lanes) for name, lanes in layouts}
    found = []
    for axis, operand in re.findall(r'"tt\.reduce"\(.*?axis = (\d+) : i32.*?\}\) : \((tensor<.*?)\) ->', ir, re.DOTALL):
        lanes = lanes_of.get(re.findall(r"#\w+", operand)[-1], [])
        axes = list(range(len(lanes[0]))) if lanes else []
        for cut in reversed(re.findall(r"slice<\{dim = (\d+)", operand) if lanes else []):  # the inner one first
            axes.pop(int(cut))
        moving = [i for i, lane in enumerate(lanes) if lane[axes[int(axis)]]]
        if moving and moving[-1] - moving[0] >= len(moving):
            found.append(operand)
    return found


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="compiles for GPUs")
@pytest.mark.parametrize("T", (1024, 16384, 300000))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_kernels_fit_other_gpus(T, dtype):
    """Compiled, without such a GPU, for one of 100 KB of shared memory a program: Ada, and Ampere's smaller ones."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from adasplash_kernels import kernels

    q = torch.empty(1, 1, T, 128, dtype=dtype)
    names = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.int16: "i16"}
    types = dict.fromkeys(("p_top", "p_shift", "p_rows"), "*fp32") | {"p_map": f"*{names[kernels._saved(q)[2].dtype]}"}
    types |= {"p_list": "*i16", "p_count": "*i32", "scale": "fp32"}
    _, forward, for_queries, for_keys = kernels._options(q, 2)
    groups = forward["TILE"] // forward["GROUP"]
    lists = dict(WORDS=forward["TILE"] // 16, GROUPS=groups, num_warps=1)
    launched = [(kernels._forward, forward), (kernels._mend, forward), (kernels._lists, lists)]
    launched += [(kernels._query_gradient, for_queries), (kernels._key_value_gradient, for_keys)]
    for kernel, chosen in launched:
        constants = chosen | {"p_alpha": None, "s_t": 128, "s_ot": 128, "s_dt": 128}
        divisible = {}
        signature = {}
        for i, name in enumerate(kernel.arg_names):
            constant, tensor = kernel.params[i].is_constexpr or name == "p_alpha", name.startswith("p_")
            if name.startswith(("p_", "s_")) and not constant:
                divisible[i,] = [["tt.divisibility", 16]]  # lets tiles be copied asynchronously, into shared memory
            signature[name] = "constexpr" if constant else types.get(name, f"*{names[dtype]}" if tensor else "i32")
        constants = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if signature[name] == "constexpr"}
        source = triton.compiler.ASTSource(kernel, signature, constants, divisible)
        launch = {name: chosen[name] for name in ("num_warps", "num_stages", "maxnreg") if name in chosen}
        compiled = triton.compile(source, target=GPUTarget("cuda", 89, 32), options=launch)
        assert compiled.metadata.shared <= 99 * 1024, kernel.__name__
        assert kernel is kernels._lists or compiled.metadata.shared > 0
        assert not scattered_reductions(compiled.asm["ttgir"]), kernel.__name__


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="compiles for GPUs")
def test_forward_compiles_for_hopper():
    pytest.importorskip("triton")
    compile_in_a_process(__file__)


def unguarded_copies(ptx):
    """How many copies into shared memory the PTX has, and where those are to which a path leads from a wait for the
    tensor cores, which is for one warp, without a barrier for all."""
    kinds = r"bar\.sync|wgmma\.wait_group|cp\.async\.bulk\.tensor\.4d\.shared|ret;"
    found = [
        re.search(rf"^\s*(\$L__BB\w+):|(@\S+\s+)?bra(?:\.uni)?\s+(\$L__BB\w+)|({kinds})", x) for x in ptx.splitlines()
    ]
    steps = [x.groups() for x in found if x]
    labels = {label: i for i, (label, *_) in enumerate(steps) if label}
    unguarded, seen, paths = set(), set(), [(0, False)]
    while paths:
        i, waited = path = paths.pop()
        if path in seen or i == len(steps):
            continue
        seen.add(path)
        _, condition, target, kind = steps[i]
        if target:
            paths.append((labels[target], waited))
        if kind == "ret;" or target and not condition:
            continue
        if kind and kind.startswith("cp") and waited:
            unguarded.add(i)
        paths.append((i + 1, kind == "wgmma.wait_group" or waited and kind != "bar.sync"))
    return sum(bool(kind) and kind.startswith("cp") for *_, kind in steps), unguarded


def compile_forward_for_hopper():
    """Four programs fit a multiprocessor, and no slot is fetched into before all warps are through with it."""
    from adasplash_kernels import forward_hopper, kernels

    forward_hopper._forward = kernel = CompileForHopper(forward_hopper._forward)
    for D, dtype, T, r in ((64, torch.bfloat16, 1024, 2), (24, torch.float16, 300, 1), (64, torch.bfloat16, 9000, 0)):
        q, alpha = torch.empty(2, 3, T, D, dtype=dtype), None if r else torch.tensor([1.3])
        _, shift, tile_map = kernels._saved(q)
        n, options, *_ = kernels._options(q, r)
        p_list = torch.empty(6 * n * n + 2, dtype=torch.int16)
        forward_hopper.forward(q, q, q, kernels.heads_last(q), shift, p_list, tile_map, alpha, 0.1, options)
    assert len(kernel.compiled) == 3
    for compiled in kernel.compiled:
        assert compiled.metadata.shared <= 57_344
        ptx = compiled.asm["ptx"]
        assert unguarded_copies(ptx) == (16, set())
        assert not scattered_reductions(compiled.asm["ttgir"])
        assert re.search(r"cp\.async\.bulk\.wait_group\s+0", ptx)  # before an output is stored again
        # and each of the four loops has a barrier without which that would not be so
        loops = re.findall(
            r"(?ms)^(\$L__BB\w+):((?:(?!^\$L__BB).)*?tensor\.4d\.shared(?:(?!^\$L__BB).)*?bra\s+\1;)", ptx
        )
        assert len(loops) == 4
        for _, loop in loops:
            assert unguarded_copies(ptx.replace(loop, loop.replace("bar.sync", "")))[1]


def test_what_the_copy_engine_takes():
    """Views of packed tensors, at whole 16 bytes, whose rows and heads lie apart from each other."""
    pytest.importorskip("triton")
    from adasplash_kernels.kernels import _copy_engine_takes as takes

    x = torch.empty(2, 4, 3, 100, 80, dtype=torch.bfloat16)
    base = -x.data_ptr() // 2 % 8  # elements to the next 16 bytes
    for first in range(16):
        assert takes(*x[..., first : first + 64].unbind(2)) == ((first - base) % 8 == 0)
    q, k, v = x[..., base : base + 64].unbind(2)
    assert takes(q[:1, :1], k[:1, :1], v[:1, :1]) and takes(q[:, :, :1], k[:, :, :1], v[:, :, :1])
    assert not takes(q, k, v[..., 4:])  # v alone begins elsewhere
    own = torch.empty(1, 4, 100, 64, dtype=torch.bfloat16)
    others = own.as_strided(own.shape, (25604, 6400, 64, 1))  # to PyTorch, contiguous
    assert others.is_contiguous() and takes(own, own, own) and not takes(own, others, others)
    assert not takes(*(y[:1].expand(2, 4, 100, 64) for y in (q, k, v)))
    assert not takes(*(y.as_strided((2, 4, 90, 64), (96000, 24000, 8, 1)) for y in (q, k, v)))  # rows overlap
    assert not takes(*torch.empty(3, 2, 4, 100, 66, dtype=torch.bfloat16)[..., :64])
    assert not takes(q[..., :20], k[..., :20], v[..., :20]) and not takes(*x.unbind(2))
    assert not takes(*torch.empty(3, 2, 4, 100, 64))


# -----------------------------------------------------------------------------
# as an operator


@pytest.mark.parametrize("alpha", (1, 1.25, 1.5, torch.tensor([1.7]), 2))
def test_packed_gives_the_same_bits(alpha):
    for (B, H, T, D), scale in (((2, 3, 65, 16), None), ((1, 2, 33, 20), 0.3)):
        tensors = normal_inputs(B, H, T, T, D)
        for x, y in zip(run_packed(*tensors, alpha, scale), run(*tensors, alpha, scale), strict=True):
            assert torch.equal(x, y)
    with pytest.raises(ValueError, match="takes .B, T, 3, H, D."):
        causal_entmax_attention_qkvpacked(torch.zeros(1, 4, 2, 3, 8))


def test_strides_may_differ():
    q, k, v, dout = normal_inputs(2, 3, 50, 50, 16)
    expected = run(q, k, v, dout, 1.5)
    heads_last = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, dout)]
    apart = torch.stack((v, v), -1)[..., 0]
    for x, y in zip(run(q, heads_last[0], apart, heads_last[1], 1.5), expected, strict=True):
        assert torch.equal(x, y)


def test_rows_beyond_31_bits_are_copied():
    pytest.importorskip("triton")
    from adasplash_kernels.kernels import _readable

    for stride, copied in ((2**25, False), (2**26, True)):
        x = torch.empty_strided((1, 1, 63, 8), (0, 0, stride, 1), device="meta")
        assert all((y.stride(2) == 8) == copied for y in _readable(x, x, x))


def test_a_second_derivative_is_refused():
    qkv = torch.randn(1, 9, 3, 2, 16, requires_grad=True)
    for out in (causal_entmax_attention_qkvpacked(qkv), causal_entmax_attention(*qkv.permute(2, 0, 3, 1, 4))):
        (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.square().sum().backward()


def test_opcheck():
    for alpha, r in ((None, 1), (None, 2), (torch.tensor([1.3]), 0)):
        q, k, v, _ = (x.requires_grad_() for x in normal_inputs(1, 2, 9, 9, 16))
        torch.library.opcheck(_operator(q, k), (q, k, v, alpha, r, 0.25))
        if "TRITON_INTERPRET" in os.environ:
            qkv = torch.randn(1, 9, 3, 2, 16, requires_grad=True)
            torch.library.opcheck(torch.ops.adasplash.entmax_packed.default, (qkv, alpha, r, 0.25))


def test_the_first_call_does_not_import_the_compiler():
    """That takes seconds, which whoever does not compile should not wait for."""
    lines = (
        "import sys, torch",
        "from adasplash_kernels import causal_entmax_attention",
        "causal_entmax_attention(*torch.randn(3, 1, 1, 9, 16, requires_grad=True)).sum().backward()",
        "assert 'torch._dynamo' not in sys.modules",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=ROOT)


def test_compile_in_one_graph():
    def attend(x, alpha):
        q, k, v = x.view(2, 31, 3, 2, 16).permute(2, 0, 3, 1, 4)  # as the model's: one projection, read in place
        return causal_entmax_attention(q, k, v, alpha).transpose(1, 2).reshape(2, 31, 32)

    x = torch.randn(2, 31, 96, requires_grad=True)
    compiled = torch.compile(attend, fullgraph=True)
    for alpha in (1.5, torch.tensor([1.3]), torch.tensor([1.4])):
        y, z = attend(x, alpha), compiled(x, alpha)
        torch.testing.assert_close(y, z)
        torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), x)[0] for o in (y, z)))


def test_autocast_and_checkpointing():
    q, k, v, dout = normal_inputs(1, 2, 30, 30, 16)
    expected = run(q, k, v, dout, 1.5)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.utils.checkpoint.checkpoint(causal_entmax_attention, q, k, v, use_reentrant=False)
    got = out, *torch.autograd.grad(out, (q, k, v), dout)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


def test_same_bits_again():
    inputs = normal_inputs(1, 2, 100, 100, 32)
    for x, y in zip(run(*inputs, 1.5), run(*inputs, 1.5), strict=True):
        assert torch.equal(x, y)


# -----------------------------------------------------------------------------
# the kernels, on a GPU


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


@pytest.fixture(params=("best", "portable"))
def forward(request, monkeypatch):
    """With the forward that this GPU gets and, on Hopper, which has its own, also with that of the others."""
    from adasplash_kernels import kernels

    if request.param == "portable":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("this GPU has no other")
        monkeypatch.setattr(kernels, "_on_hopper", lambda q, k, v: False)


@gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("alpha", (1.01, 1.25, 1.5, 1.75, 2.0))
def test_gpu_accuracy(dtype, alpha, forward):
    draw = random.Random(f"{dtype} {alpha}")
    for seed in range(3):
        T, D = draw.choice([1, 63, 65, 128, 255, 1000, 1025]), draw.choice([8, 16, 20, 40, 64, 80, 128])
        check(*normal_inputs(1, 3, T, T, D, seed, dtype, "cuda", spread=draw.choice([0.3, 1, 5])), alpha)


@gpu
@pytest.mark.parametrize("T, dtype", [(4095, torch.float32), (8192, torch.bfloat16), (9000, torch.bfloat16)])
@pytest.mark.parametrize("alpha", (1.5, 2.0))
def test_gpu_long(T, dtype, alpha, forward):
    check(*normal_inputs(1, 1, T, T, 64, 0, dtype, "cuda", spread=2), alpha)


@gpu
@pytest.mark.parametrize("alpha", (1.01, 1.25, 1.5, 1.75, 2.0))
@pytest.mark.parametrize("scores", EXTREMES)
def test_gpu_extreme_scores(scores, alpha, forward):
    for dtype in (torch.float32, torch.bfloat16):
        check(*exact_inputs(*EXTREMES[scores], dtype=dtype, device="cuda"), alpha, scale=1.0)


@gpu
def test_gpu_keys_just_below_the_threshold(forward):
    for seed in range(4):
        assert clustered_error(64, 512, seed, torch.bfloat16, "cuda") < 0.03
        assert clustered_error(64, 512, seed, torch.float16, "cuda") < 0.01


@gpu
def test_gpu_blocks_done_again(forward):
    """Their gradients too, with rows beyond T, and beside a row with NaN."""
    for H, T in ((512, 100), (64, 512)):
        q, k, v = clustered_inputs(H, T, 0, torch.bfloat16, "cuda")
        again = _operator(q, k)(q, k, v, None, 2, 1.0)[3].diagonal(dim1=1, dim2=2).any(1)  # (H, blocks of queries)
        assert again.any()
        dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(0)).to(q)
        got = run(q, k, v, dout, 1.5, 1.0)
        expected = dense(q.double(), k.double(), v.double(), dout.double(), 1.5, 1.0)
        assert max(error(x, y) for x, y in zip(got, expected, strict=True)) < 0.02
        head, block = again.nonzero()[0].tolist()
        q[0, head, 64 * block] = math.nan
        out = causal_entmax_attention(q, k, v, 1.5, 1.0)
        assert out[0, head, 64 * block].isnan().all()
        out[0, head, 64 * block] = expected[0][0, head, 64 * block]
        assert error(out, expected[0]) < 0.02


@gpu
def test_gpu_nan_in_nan_out(forward):
    for which, dtype in itertools.product(range(3), (torch.float32, torch.bfloat16)):
        inputs = normal_inputs(1, 2, 300, 300, 64, dtype=dtype, device="cuda")
        inputs[which][0, 1, 20] = math.nan
        out, dq, *_ = run(*inputs, 1.5)
        assert out[0, 1, 20].isnan().all() and dq[0, 1, 20].isnan().all()
        assert which != 1 or out[0, 1, 20:].isnan().all()
        assert not out[0, 0].isnan().any()


@gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_gpu_tiles_with_support_are_visited(dtype, alpha, forward):
    check_support(dtype, alpha, 300, "cuda")
    check_support(dtype, alpha, 2300, "cuda")  # lists of more than 32 tiles


@gpu
def test_gpu_strides(forward):
    """Views that the copies of Hopper's forward take, and such as they do not."""
    x = torch.randn(2, 4, 3, 100, 72, device="cuda").bfloat16()
    dout = torch.randn(2, 4, 100, 64, device="cuda").bfloat16()
    for first in (0, 1, 4, 8):
        q, k, v = x[..., first : first + 64].unbind(2)
        expected = run(q.contiguous(), k.contiguous(), v.contiguous(), dout, 1.5)
        for a, b in zip(run(q, k, v, dout, 1.5), expected, strict=True):
            assert error(a, b) < 1e-3
    q, k, v = x[:1, :1, :, :, :64].expand(2, 4, 3, 100, 64).unbind(2)
    for a, b in zip(run(q, k, v, dout, 1.5), run(q.clone(), k.clone(), v.clone(), dout, 1.5), strict=True):
        assert error(a, b) < 1e-3


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_that_is_not_the_current_one():
    inputs = normal_inputs(2, 2, 100, 100, 64, 0, torch.bfloat16, "cuda:0")
    for a, b in zip(run(*inputs, 1.5), run(*(x.to("cuda:1") for x in inputs), 1.5), strict=True):
        assert b.device.index == 1 and torch.equal(a, b.to("cuda:0"))


@gpu
def test_gpu_one_key_has_no_gradient():
    for alpha in (1.25, 1.5, 2.0):
        _, dq, dk, _ = run(*normal_inputs(2, 2, 1, 1, 64, 0, torch.bfloat16, "cuda"), alpha)
        assert not dq.any() and not dk.any()


@gpu
def test_gpu_reads_the_projection_in_place_and_repeats_its_bits():
    x = torch.randn(2, 333, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
    views, copies = x.permute(2, 0, 3, 1, 4), x.permute(2, 0, 3, 1, 4).contiguous()
    dout = torch.randn(2, 4, 333, 64, device="cuda", dtype=torch.bfloat16)
    results = run(*views, dout, 1.5), run(*copies, dout, 1.5), run_packed(*copies, dout, 1.5)
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@gpu
def test_gpu_opcheck():
    for alpha, r in ((None, 1), (None, 2), (torch.tensor([1.3], device="cuda"), 0)):
        q, k, v, _ = (x.requires_grad_() for x in normal_inputs(1, 2, 70, 70, 16, device="cuda"))
        torch.library.opcheck(torch.ops.adasplash.entmax.default, (q, k, v, alpha, r, 0.25))
        qkv = torch.randn(1, 70, 3, 2, 16, device="cuda", requires_grad=True)
        torch.library.opcheck(torch.ops.adasplash.entmax_packed.default, (qkv, alpha, r, 0.25))


@gpu
def test_gpu_compile_autocast_checkpointing():
    weight = torch.randn(64, 192, device="cuda") / 8

    def attend(x, alpha):
        qkv = (x @ weight).view(2, 100, 3, 4, 16)
        return causal_entmax_attention_qkvpacked(qkv, alpha).transpose(1, 2).reshape(2, 100, 64)

    compiled = torch.compile(attend, fullgraph=True)
    x = torch.randn(2, 100, 64, device="cuda", requires_grad=True)
    for alpha in (1.5, torch.tensor([1.3], device="cuda"), torch.tensor([1.4], device="cuda")):
        with torch.autocast("cuda", torch.bfloat16):
            y, z = attend(x, alpha), compiled(x, alpha)
            c = torch.utils.checkpoint.checkpoint(attend, x, alpha, use_reentrant=False)
        gy, gz, gc = (torch.autograd.grad(o.float().square().sum(), x)[0] for o in (y, z, c))
        assert y.dtype == torch.bfloat16 and error(z, y) < 1e-2 and error(gz, gy) < 2e-2
        assert torch.equal(y, c) and torch.equal(gy, gc)


if __name__ == "__main__":
    compile_forward_for_hopper()
