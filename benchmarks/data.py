"""Time the data path on a CPU: batches a second, opening a large set of shards, tokenizing beside bare tiktoken.

    python benchmarks/data.py --cores 2 --text FILE --json benchmarks/results/data.json

Without --text, the Python standard library's source is tokenized. The shards are made in a temporary folder: two of 20M
random tokens (which are in the page cache when they are read), and 103 of 100M that are sparse and take no room.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import tokenize_text
from data.shards import HEADER_BYTES, MAGIC, VERSION, TokenStream, find_shards, training_batches, write_shard
from data.tokenizer import load_tokenizer

T, BATCH = 1024, 64


def resident_mb():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def loading(folder, steps=300):
    """Million tokens a second of shuffled batches of 64 x 1024 from two shards."""
    rng = np.random.default_rng(0)
    for i in (1, 2):
        write_shard(folder / f"x_train_{i:06d}.bin", rng.integers(0, 50257, 20_000_000, dtype=np.uint16))
    stream = TokenStream(find_shards(str(folder), "train", "folder"), T, 50257)
    batches = training_batches(stream, 0, 0, BATCH, torch.device("cpu"))
    for _ in range(stream.windows // BATCH):  # an epoch: what follows comes from the page cache
        next(batches)
    began = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return {"million_tokens_per_s": steps * BATCH * T / 1e6 / (time.perf_counter() - began)}


def opening(folder, shards=103, tokens=100_000_000):
    """Seconds and resident memory from a folder of shards to its first batch and its fingerprint."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    for i in range(1, shards + 1):
        with open(folder / f"y_train_{i:06d}.bin", "wb") as file:
            file.write(header)
            file.truncate(HEADER_BYTES + 2 * tokens)
    before, began = resident_mb(), time.perf_counter()
    stream = TokenStream(find_shards(str(folder), "train", "folder"), T, 50257)
    opened = time.perf_counter() - began
    stream.fingerprint()
    next(training_batches(stream, 0, 0, BATCH, torch.device("cpu")))
    seconds = time.perf_counter() - began
    return {"open_s": opened, "to_first_batch_s": seconds, "resident_mb": resident_mb() - before}


def standard_library(folder):
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))[:3000]
    path = folder / "text.txt"
    path.write_text("\n".join(source.read_text(errors="ignore") for source in sources))
    return path


def tokenizing(path, folder, workers, rounds=5):
    """MB/s of the command and of tiktoken alone in as many threads, by turns: the best of some rounds."""
    gpt2, text = load_tokenizer("gpt2"), path.read_bytes().decode()
    parts = [text[i : i + 2**20] for i in range(0, len(text), 2**20)]
    seconds = {"command": [], "tiktoken": []}
    for i in range(rounds):
        began = time.perf_counter()
        tokenize_text.main([str(path), "--out", str(folder / f"out{i}"), "--workers", str(workers)])
        seconds["command"].append(time.perf_counter() - began)
        began = time.perf_counter()
        with ThreadPoolExecutor(workers) as threads:
            list(threads.map(partial(gpt2.encode_to_numpy, disallowed_special=()), parts))
        seconds["tiktoken"].append(time.perf_counter() - began)
    size = path.stat().st_size / 1e6
    best = {f"{name}_mb_per_s": size / min(times) for name, times in seconds.items()}
    return best | {"ratio": best["command_mb_per_s"] / best["tiktoken_mb_per_s"], "workers": workers, "mb": size}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="what to tokenize")
    parser.add_argument("--cores", type=int, default=2, help="cores and threads to use")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    torch.set_num_threads(args.cores)
    results = {"date": str(datetime.date.today()), "machine": platform.platform(), "cores": args.cores}
    results |= {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tiktoken")}
    with tempfile.TemporaryDirectory() as folder:
        parts = {name: Path(folder) / name for name in ("opening", "loading", "tokenizing")}
        for part in parts.values():
            part.mkdir()
        results["opening"] = opening(parts["opening"])
        results["loading"] = loading(parts["loading"])
        text = args.text or standard_library(parts["tokenizing"])
        results["tokenizing"] = tokenizing(text, parts["tokenizing"], args.cores)
    print(json.dumps(results, indent=2))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
