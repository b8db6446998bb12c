"""Time causal attention, forward and forward+backward: ours beside softmax and the published adasplash package.

    python benchmarks/attention.py --activations FOLDER --json benchmarks/results/attention_h200.json

FOLDER holds q.npy and k.npy, bfloat16 bits as uint16, (layers, heads, T, D): what a trained entmax model multiplies.
Their times are summed over the layers. The other inputs are Gaussian, bfloat16, with B * T = 65,536 and 12 heads of 64.
Peers that are not installed (see requirements.txt) or do not run are left out, with a line that says so.
"""

import argparse
import datetime
import importlib.metadata
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))
from adasplash_kernels import causal_entmax_attention

B, H, T, D = 64, 12, 1024, 64


def softmax(backend, q, k, v):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def methods():
    """Name -> a function of q, k, v (B, H, T, D)."""
    found = {"entmax 1.5": causal_entmax_attention}
    for alpha in (1.25, 2.0):
        found[f"entmax {alpha}"] = partial(causal_entmax_attention, alpha=alpha)
    found["softmax, SDPA flash"] = partial(softmax, SDPBackend.FLASH_ATTENTION)
    found["softmax, SDPA cuDNN"] = partial(softmax, SDPBackend.CUDNN_ATTENTION)
    try:
        from adasplash import adasplash_v1, adasplash_v2
    except ImportError:
        print("adasplash is not installed: left out", file=sys.stderr)
    else:
        found["adasplash v2, niter=1"] = partial(adasplash_v2, niter=1)
        found["adasplash v1, 3 iterations"] = partial(adasplash_v1, alpha=1.5, is_causal=True, niter=3)
    return found


def time(function, repeat):
    """The median of some calls, in ms."""
    function()
    times = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times)


def measure(attend, q, k, v, dout, repeat):
    """(forward, forward + backward) in ms."""
    with torch.no_grad():
        forward = time(lambda: attend(q, k, v), repeat)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    return forward, time(lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), dout), repeat)


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


def cases(args):
    """Yield (name, list of inputs whose times are summed)."""
    if args.activations:
        yield f"trained, {B}x{T}, sum of layers", trained(args.activations)
    for length in args.lengths:
        yield f"Gaussian, {B * T // length}x{length}", [gaussian(B * T // length, length)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", type=Path, help="folder with q.npy and k.npy")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 16384], help="of the Gaussian inputs")
    parser.add_argument("--methods", nargs="*", default=[""], help="only those whose name starts with one of these")
    parser.add_argument("--repeat", type=int, default=20, help="calls of which the median is taken")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    packages = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    results = {"date": str(datetime.date.today()), "device": torch.cuda.get_device_name(), **packages, "cases": {}}
    chosen = {name: f for name, f in methods().items() if name.startswith(tuple(args.methods))}
    for case, inputs in cases(args):
        sums = {name: [0.0, 0.0] for name in chosen}
        for tensors in inputs:
            for name in list(sums):
                try:
                    times = measure(chosen[name], *tensors, args.repeat)
                except Exception as error:  # a peer's own limits: shapes, memory, compilers
                    print(f"{name} left out of {case}: {error!r:.200}", file=sys.stderr)
                    del sums[name]
                else:
                    sums[name] = [a + b for a, b in zip(sums[name], times, strict=True)]
        print(f"\n{case:40}   forward  forward+backward, ms")
        for name, (forward, both) in sums.items():
            print(f"  {name:38} {forward:9.3f} {both:9.3f}", flush=True)
        results["cases"][case] = {name: {"forward_ms": f, "forward_backward_ms": b} for name, (f, b) in sums.items()}
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
