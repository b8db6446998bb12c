"""Time causal attention, forward and forward+backward: ours beside softmax and the published adasplash package.

    python benchmarks/attention.py --activations FOLDER --json benchmarks/results/attention_h200.json

FOLDER holds q.npy and k.npy, bfloat16 bits as uint16, (layers, heads, T, D): what a trained entmax model multiplies.
Their times are summed over the layers. The other inputs have B * T = 65,536 and 12 heads of 64, bfloat16: Gaussian
ones, where hardly a tile is empty, and some that leave a chosen share of the 64 x 64 causal tiles empty. The share that
entmax with alpha = 1.5 really leaves empty is counted and printed beside each. With --json a picture is drawn too.
Peers that are not installed (see requirements.txt) or do not run are left out, with a line that says so. The adasplash
package chooses launch options for each T anew, which takes minutes: beyond T = 4,096 it has those that it chose last.
"""

import argparse
import datetime
import json
import math
import statistics
import sys
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))
from adasplash_kernels import causal_entmax_attention
from sparsity import TILE, supports
from train_gpt2 import versions

B, H, T, D = 64, 12, 1024, 64


def softmax(backend, q, k, v):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def methods():
    """Name -> (the longest T that it is measured at, a function of q, k, v (B, H, T, D))."""
    found = {"entmax 1.5": (math.inf, causal_entmax_attention)}
    for alpha in (1.1, 1.25, 1.75, 2.0):
        found[f"entmax {alpha}"] = 1024, partial(causal_entmax_attention, alpha=alpha)
    found["softmax, SDPA flash"] = math.inf, partial(softmax, SDPBackend.FLASH_ATTENTION)
    found["softmax, SDPA cuDNN"] = math.inf, partial(softmax, SDPBackend.CUDNN_ATTENTION)
    try:
        from adasplash import adasplash_v1, adasplash_v2
    except ImportError:
        print("adasplash is not installed: left out", file=sys.stderr)
    else:
        found["adasplash v2, niter=1"] = math.inf, partial(adasplash_v2, niter=1)
        found["adasplash v1, 3 iterations"] = 1024, partial(adasplash_v1, alpha=1.5, is_causal=True, niter=3)
    try:
        from entmax import entmax15
    except ImportError:
        print("entmax is not installed: left out", file=sys.stderr)
    else:

        def dense(q, k, v):  # sequence by sequence, or the scores and what sorting keeps of them fill the memory
            future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
            scores = ((x @ y.mT * D**-0.5).masked_fill(future, -math.inf) for x, y in zip(q, k, strict=True))
            return torch.stack([entmax15(z, dim=-1) @ x for z, x in zip(scores, v, strict=True)])

        found["entmax 1.5, dense, entmax package"] = 1024, dense
    return found


def time(function, repeat):
    """The median in ms of `repeat` calls, or of as many as take a second, but three.

    They are queued while the GPU is busy, so that launching is not timed.
    """
    function()
    torch.cuda.synchronize()
    start = perf_counter()
    function()
    torch.cuda.synchronize()
    repeat = max(3, min(repeat, int(1 / (perf_counter() - start))))
    times = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
    torch.cuda._sleep(4_000_000 * repeat)  # cycles, some 2 ms for each call
    for start, end in times:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times)


def measure(attend, q, k, v, dout, repeat):
    """(forward, forward + backward) in ms."""
    with torch.no_grad():
        forward = time(lambda: attend(q, k, v), repeat)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    return forward, time(lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), dout), repeat)


def keep_options():
    """Let the adasplash package's kernels have the launch options that they chose last from here on."""
    modules = [module for name, module in sys.modules.items() if name.startswith("adasplash.")]
    for kernel in (value for module in modules for value in vars(module).values()):
        if isinstance(kernel, triton.runtime.Autotuner) and hasattr(kernel, "best_config"):
            kernel.configs = [kernel.best_config]


def gaussian(B, T, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(B, H, T, D, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(4)]


def trained(folder):
    """Yield q, k of each layer and Gaussian v, dout, the one sequence repeated to a batch of B."""
    q, k = (np.load(Path(folder) / name, mmap_mode="r") for name in ("q.npy", "k.npy"))
    _, _, v, dout = gaussian(B, q.shape[2])
    for layer in zip(q, k, strict=True):
        q, k = (torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16).cuda() for x in layer)
        yield q.repeat(B, 1, 1, 1), k.repeat(B, 1, 1, 1), v, dout


def sparse(B, T, empty, seed=0):
    """q, k, v, dout such that about a share `empty` of the tiles below the diagonal has no support.

    The keys of a tile share one of 32 directions. A tile of queries points at its own and at a random choice of the
    others, so that scores are 16 there, give or take a hundredth, and 0 elsewhere.
    """
    q, k, v, dout = gaussian(B, T, seed)
    generator, directions = torch.Generator("cuda").manual_seed(seed + 1), 32
    n = -(-T // TILE)
    own = torch.randint(directions, (B, H, n), device="cuda", generator=generator)
    keys = F.one_hot(own, directions)
    # a tile's own direction is that of 1/32 of all tiles
    wanted = torch.rand(B, H, n, directions, device="cuda", generator=generator) * (1 - 1 / 32) < 1 - empty - 1 / 32
    queries = torch.maximum(wanted.long(), keys)
    for x, tiles, size in ((q, queries, 8 * 16), (k, keys, 1)):
        x *= 0.01
        x[..., :directions] = size * tiles.repeat_interleave(TILE, dim=2)[:, :, :T]
    return q, k, v, dout


def empty_tiles(q, k):
    """The share of 64 x 64 causal tiles without support at alpha = 1.5, of the first sequence (two heads if long)."""
    counted = H if q.shape[2] <= 8192 else 2
    heads = zip(q[0, :counted], k[0, :counted], strict=True)
    busy = [supports(q[None, None], k[None, None], 1.5)[1].sum().item() for q, k in heads]
    n = -(-q.shape[2] // TILE)
    return 1 - statistics.fmean(busy) / (n * (n + 1) / 2)


def cases(args):
    """Yield (name, T, list of inputs whose times are summed)."""
    if args.activations:
        yield f"trained, {B}x{T}, sum of layers", T, trained(args.activations)
    for length in args.lengths:
        yield f"Gaussian, {B * T // length}x{length}", length, [gaussian(B * T // length, length)]
    for length in args.lengths:
        for empty in args.empty if length > T else ():
            yield f"{empty:.0%} empty, {B * T // length}x{length}", length, [sparse(B * T // length, length, empty)]


def draw(results, path):
    """Forward+backward against T for Gaussian inputs, and against the share of empty tiles at the longest T."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    by_length, by_share = figure.subplots(1, 2)
    points = {}
    for case, result in results["cases"].items():
        for name, times in result["methods"].items():
            point = result["T"], result["empty_tiles"], times["forward_backward_ms"]
            points.setdefault(name, []).append((case.split(",")[0], *point))
    lengths = sorted({result["T"] for result in results["cases"].values()})
    for i, (name, measured) in enumerate(points.items()):
        made = [(t, ms) for kind, t, _, ms in measured if kind == "Gaussian"]
        by_length.plot(*zip(*made, strict=True), "o-", color=f"C{i}", label=name) if made else None
        longest = sorted((share, ms) for _, t, share, ms in measured if t == lengths[-1])
        by_share.plot(*zip(*longest, strict=True), "o-", color=f"C{i}") if longest else None
    by_length.set(xscale="log", yscale="log", xlabel="T, tokens", title="Gaussian inputs: hardly an empty tile")
    by_length.set_xticks(lengths, [f"{t:,}" for t in lengths], rotation=30)
    by_length.minorticks_off()
    by_share.set(xlabel="share of empty 64 x 64 tiles", title=f"T = {lengths[-1]:,}", ylim=(0, None))
    for axes in (by_length, by_share):
        axes.set_ylabel("forward and backward, ms")
    figure.legend(loc="outside right center", fontsize=8)
    figure.suptitle(f"causal attention, B T = {B * T:,}, {H} heads of {D}, bfloat16, {results['device']}")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", type=Path, help="folder with q.npy and k.npy")
    lengths = [1024, 4096, 8192, 16384, 32768, 65536]
    parser.add_argument("--lengths", type=int, nargs="*", default=lengths, help="of the inputs that are made")
    parser.add_argument("--empty", type=float, nargs="*", default=[0.6, 0.85, 0.95], help="shares of empty tiles")
    parser.add_argument("--methods", nargs="*", default=[""], help="only those whose name starts with one of these")
    parser.add_argument("--repeat", type=int, default=20, help="calls of which the median is taken, if that is quick")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    results = {"date": str(datetime.date.today()), "device": torch.cuda.get_device_name()}
    results |= versions("torch", "triton", "adasplash", "entmax") | {"cases": {}}
    chosen = {name: f for name, f in methods().items() if name.startswith(tuple(args.methods))}
    for case, length, inputs in cases(args):
        sums = {name: [0.0, 0.0] for name, (longest, _) in chosen.items() if length <= longest}
        shares = []
        if length > 4096:
            keep_options()
        for tensors in inputs:
            shares.append(empty_tiles(*tensors[:2]))
            for name in list(sums):
                try:
                    times = measure(chosen[name][1], *tensors, args.repeat)
                except Exception as error:  # a peer's own limits: shapes, memory, compilers
                    print(f"{name} left out of {case}: {error!r:.200}", file=sys.stderr)
                    del sums[name]
                else:
                    sums[name] = [a + b for a, b in zip(sums[name], times, strict=True)]
        share = statistics.fmean(shares)
        print(f"\n{case + f', {share:.1%} of the tiles are empty':58}   forward  forward+backward, ms")
        for name, (forward, both) in sums.items():
            print(f"  {name:56} {forward:9.3f} {both:9.3f}", flush=True)
        times = {name: {"forward_ms": f, "forward_backward_ms": b} for name, (f, b) in sums.items()}
        results["cases"][case] = {"T": length, "empty_tiles": share, "methods": times}
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=2) + "\n")
            draw(results, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
