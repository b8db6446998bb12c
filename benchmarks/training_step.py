"""Time whole training steps of GPT-2 124M: softmax and entmax by this trainer, beside a plain compiled GPT-2.

    python benchmarks/training_step.py --json benchmarks/results/training_step_h100.json
    python benchmarks/training_step.py --checkpoint runs/entmax/checkpoint_762 --data data/fineweb10B

The baseline is a GPT-2 as one would write it down: torch.compile, bfloat16 autocast (which leaves the residual stream
in float32), a padded vocabulary, PyTorch's cuDNN attention, fused AdamW. It and ours take the same batches, 524,288
tokens a step: random tokens, or those of --data. The entmax of --checkpoint, where trained weights leave tiles empty,
is a case of its own; it wants real text. Every case has a process of its own, so that its first step is that of a cold
start.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoint
from data.shards import TokenStream, find_shards, training_batches
from model import GPT, SIZES, GPTConfig
from train_gpt2 import (
    Config,
    Gradients,
    add_gradients,
    compile_model,
    make_optimizer,
    peak_flops,
    start_machine,
    versions,
)

CASES = ("baseline", "softmax", "entmax", "entmax, trained")
VOCAB_SIZE = 50257
WARM_UP = 2  # steps before those that count

# -----------------------------------------------------------------------------
# the baseline


class PlainBlock(nn.Module):
    def __init__(self, n_head, C):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(self.ln_1(x)).split(C, dim=2)
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    def __init__(self, n_layer, n_head, C, T):
        super().__init__()
        padded = -(-VOCAB_SIZE // 128) * 128
        self.wte, self.wpe = nn.Embedding(padded, C), nn.Embedding(T, C)
        self.h = nn.ModuleList(PlainBlock(n_head, C) for _ in range(n_layer))
        self.ln_f, self.head = nn.LayerNorm(C), nn.Linear(C, padded, bias=False)
        self.head.weight = self.wte.weight
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.head(self.ln_f(x)).flatten(0, 1), targets.flatten())


def add_plain_gradients(model, batches, micro_batches, machine):
    """add_gradients, as one would write it down."""
    model.zero_grad()
    loss = torch.zeros((), device=machine.device)
    for inputs, targets in itertools.islice(batches, micro_batches):
        with machine.precision():
            micro_loss = model(inputs, targets) / micro_batches
        micro_loss.backward()
        loss += micro_loss.detach()
    return loss


# -----------------------------------------------------------------------------
# one case, in a process of its own


def build(case, args):
    """The model of a case."""
    n_layer, n_head, C = SIZES[args.model]
    if case == "baseline":
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(True)
        return PlainGPT(n_layer, n_head, C, args.sequence_length)
    if case == "entmax, trained":
        return checkpoint.load_model(checkpoint.load(args.checkpoint))
    model = GPT(GPTConfig(n_layer, n_head, C, args.sequence_length, VOCAB_SIZE, case))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def batches_of(args, micro_batch_size, device):
    """Yield (inputs, targets) for ever."""
    if args.data:
        stream = TokenStream(find_shards(args.data, "train", "--data"), args.sequence_length, VOCAB_SIZE)
        return training_batches(stream, 0, 0, micro_batch_size, device)
    generator = torch.Generator().manual_seed(0)
    size = (micro_batch_size, args.sequence_length + 1)
    drawn = [torch.randint(VOCAB_SIZE, size, generator=generator).to(device) for _ in range(4)]
    return ((tokens[:, :-1], tokens[:, 1:]) for tokens in itertools.cycle(drawn))


KINDS = {  # of kernels, by what their names hold; the first that fits counts
    "loss": ("log_softmax", "nll_loss", "logsumexp", "cross_entropy", "one_hot"),
    "attention": ("flash", "fmha", "sdpa", "cudnn", "_forward", "_mend", "_lists", "query_gradient", "value_gradient"),
    "optimizer": ("multi_tensor", "adam", "lpnorm", "cudafunctor_add"),  # and what adds up gradients
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "_product"),  # the last with GELU
    "copies": ("memcpy", "memset"),
}


def kind_of(name):
    """The kind of a kernel. Inductor's names tell which operations it fused, so those go by the loss alone."""
    name = name.lower()
    kinds = ("loss",) if name.startswith("triton_") else KINDS
    return next((kind for kind in kinds if any(part in name for part in KINDS[kind])), "elementwise")


def breakdown(step, device):
    """The ms of one step by kind of kernel, and what is between the kernels."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    wall = 1e3 * (time.perf_counter() - began)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kinds, kernels = Counter(), Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kinds[kind_of(event.name)] += event.device_time / 1e3
            kernels[event.name[:100]] += event.device_time / 1e3
    kinds["idle"] = wall - sum(kinds.values())
    return {"ms": dict(kinds.most_common()), "longest_kernels_ms": dict(kernels.most_common(25))}


def measure(case, micro_batch_size, args):
    """The figures of one case."""
    machine = start_machine(args.device, "bfloat16")
    device = machine.device
    torch.manual_seed(0)
    model = build(case, args).to(device)
    optimizer = make_optimizer(model, Config())
    for group in optimizer.param_groups:  # the weights stay as they are, and so do the tiles that they leave empty
        group["lr"] = 0.0
    compiled, plain = model, case == "baseline"
    gradients = None if plain else Gradients(model, machine, fold=device.type == "cuda")
    if args.compile == "true":
        compiled = torch.compile(model, dynamic=False, fullgraph=True) if plain else compile_model(model)
    batches = batches_of(args, micro_batch_size, device)

    def step():
        """As the trainer's: ends when the device has done it all."""
        rest = batches, args.batch_size // micro_batch_size, machine
        loss = add_plain_gradients(compiled, *rest) if plain else add_gradients(compiled, gradients, *rest)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert math.isfinite(loss.item()) and math.isfinite(norm.item())
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    first_step_s = time.time() - args.started
    for _ in range(WARM_UP):
        step()
    times = []
    for _ in range(args.steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    seconds, tokens = statistics.median(times), args.batch_size * args.sequence_length
    n_layer, C = len(model.h), model.wte.embedding_dim
    parameters = sum(p.numel() for p in model.parameters())
    flops = (6 * parameters + 12 * n_layer * C * args.sequence_length) * tokens
    peak = peak_flops(device)
    memory, reserved = None, None
    if device.type == "cuda":
        memory, reserved = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
    return {
        "tokens_per_s": tokens / seconds,
        "step_ms": 1e3 * seconds,
        "slowest_step_ms": 1e3 * max(times),
        "mfu": flops / seconds / peak if peak else None,
        "peak_memory_gb": memory,
        "reserved_memory_gb": reserved,
        "first_step_s": first_step_s,
        "breakdown": breakdown(step, device),
    }


# -----------------------------------------------------------------------------
# all cases


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="of a trained entmax model, for a case of its own")
    parser.add_argument("--data", help="training shards: a file, a glob or a folder; random tokens without")
    parser.add_argument("--model", default="gpt2", choices=SIZES, help="the size")
    parser.add_argument("--sequence_length", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=512, help="sequences a step")
    parser.add_argument("--micro_batch_sizes", type=int, nargs="*", default=[64, 16], help="sequences a forward pass")
    parser.add_argument("--steps", type=int, default=8, help="steps of which the median is taken")
    parser.add_argument("--cases", nargs="*", choices=CASES, help="only these")
    parser.add_argument("--compile", default="true", choices=("true", "false"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "SIZE"), help=argparse.SUPPRESS)  # what a child measures
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)  # and when it was started
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args)))
        return
    for size in args.micro_batch_sizes:
        if size < 1 or args.batch_size % size:
            parser.error(f"batch_size {args.batch_size} is not a multiple of micro-batch {size}")
    if "entmax, trained" in (args.cases or ()) and not args.checkpoint:
        parser.error("the case 'entmax, trained' needs --checkpoint")
    cases = args.cases or [case for case in CASES if case != "entmax, trained" or args.checkpoint]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    results = {"date": str(datetime.date.today()), "device": device}
    results |= versions("torch", "triton")
    results |= {"batch_size": args.batch_size, "sequence_length": args.sequence_length, "cases": {}}
    failed = []
    print(f"{'case':28} tokens/s  ms/step   mfu  peak GB  first step s  x baseline")
    for size in args.micro_batch_sizes:
        for case in cases:
            with tempfile.TemporaryDirectory() as cold:  # nothing compiled before
                caches = {"TORCHINDUCTOR_CACHE_DIR": f"{cold}/inductor", "TRITON_CACHE_DIR": f"{cold}/triton"}
                command = [sys.executable, *sys.argv, "--one", case, str(size), "--started", str(time.time())]
                child = subprocess.run(command, env=os.environ | caches, stdout=subprocess.PIPE, text=True)
            name = f"{case}, micro-batch {size}"
            if child.returncode:
                failed.append(name)  # as the baseline does on a small card, where ours may not
                print(f"{name:28} failed")
                continue
            result = results["cases"][name] = json.loads(child.stdout.splitlines()[-1])
            baseline = results["cases"].get(f"baseline, micro-batch {size}", result)
            ratio = result["tokens_per_s"] / baseline["tokens_per_s"]
            mfu, memory = (math.nan if x is None else x for x in (result["mfu"], result["peak_memory_gb"]))
            print(f"{name:28} {result['tokens_per_s']:8,.0f} {result['step_ms']:8.1f} {mfu:5.3f} {memory:8.2f} "
                  f"{result['first_step_s']:13.1f} {ratio:11.3f}", flush=True)  # fmt: skip
            for kind, ms in result["breakdown"]["ms"].items() if result["breakdown"] else ():
                print(f"    {kind:20} {ms:8.1f} ms")
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(results, indent=2) + "\n")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
