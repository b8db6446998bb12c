"""What the tests share: shards, processes, and ways to run kernels without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cli
from data.shards import write_shard

torch.set_num_threads(1)  # the tests share the cores: see pytest -n
ROOT = Path(__file__).parent.parent
NOT_REPRODUCED = {"step_ms", "tokens_per_s", "mfu", "peak_memory_bytes", "val_ms"}  # times and memory


def patch_language_once():
    """Have Triton's interpreter patch triton.language once a launch, not at each call of a function.

    That was half of its time.
    """
    from triton import language
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        found = {x for x in function.__globals__.values() if x is language or x is language.core}
        if found and found <= patched:
            return None  # by a function's call, which does not restore
        scope = patch(function)
        restore, first = scope.restore, not patched
        patched.update(found)

        def restore_all():
            restore()
            patched.clear()

        if first:
            scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    patch_language_once()


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder with two training shards and one validation shard of bytes that a small model can learn."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    words = [rng.integers(97, 123, size=rng.integers(2, 9)).astype(np.uint16) for _ in range(50)]
    for name, size in (("text_train_000001", 3001), ("text_train_000002", 4097), ("text_val_000000", 2311)):
        text = [np.array([256], dtype=np.uint16)]
        while sum(map(len, text)) < size:
            text += [words[rng.integers(50)], np.array([32], dtype=np.uint16)]
        write_shard(folder / f"{name}.bin", np.concatenate(text)[:size])
    return folder


@pytest.fixture(scope="session")
def flags(shards):
    """Flags of a run of seconds on those shards; later flags override earlier ones."""
    small = {"train_data": shards, "val_data": shards, "sequence_length": 64, "batch_size": 4, "micro_batch_size": 4}
    small |= {"max_steps": 8, "warmup_steps": 2, "val_every": 4, "val_tokens": 1024, "checkpoint_every": 2}
    small |= {"sample_every": 0, "device": "cpu"}
    return [f"--{name}={value}" for name, value in small.items()]


@pytest.fixture
def start(tmp_path):
    """Start one of the project's programs in a process of its own, in a folder of its own. It ends with the test."""
    started = []

    def popen(script, *args, ranks=1, **kwargs):
        launch = [sys.executable]
        if ranks > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | kwargs.pop("env", {})
        command = [*launch, str(ROOT / script), *map(str, args)]
        kwargs = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | kwargs
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **kwargs))
        return started[-1]

    yield popen
    for process in started:
        process.kill()


@pytest.fixture
def run(start):
    """Run one of the project's programs to its end; returns (exit code, stdout, stderr)."""

    def finish(script, *args, stdin=None, **kwargs):
        if stdin is not None:
            kwargs["stdin"] = subprocess.PIPE
        process = start(script, *args, **kwargs)
        out, err = process.communicate(stdin.encode() if stdin is not None else None, timeout=500)
        return process.returncode, out.decode(), err.decode()

    return finish


def call(main, capsys, *args):
    """A program's main() in this process: exit code, stdout, stderr."""
    capsys.readouterr()
    try:
        cli.run(lambda: main([str(arg) for arg in args]))
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def run_in_interpreter(file, chosen):
    """Those tests of a file once more, in a process where Triton runs kernels on CPU tensors. Skips without Triton."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-k", chosen, "-m", "not gpu", file]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


def compile_in_a_process(file):
    """Run that file, which compiles kernels in Gluon: its compiler leaks, and says so."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


class CompileForHopper:
    """In the place of a kernel: compiles it instead of launching it, with Hopper as Triton's GPU from here on.

    That needs no GPU, and shows whether this Triton's Gluon, which still changes, takes the kernel.
    """

    def __init__(self, kernel):
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver

        self.kernel, self.compiled = kernel, []
        hopper = GPUTarget("cuda", 90, 32)
        current = {"get_current_target": lambda: hopper, "get_current_device": lambda: 0}
        driver.set_active(SimpleNamespace(**current, get_current_stream=lambda device: 0))

    def __getitem__(self, grid):
        return lambda *args, **options: self.compiled.append(self.kernel.warmup(*args, grid=grid, **options))


def read_log(run_dir):
    """The records of a run without those of its starts, and without times and memory."""
    records = [json.loads(line) for line in (Path(run_dir) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in NOT_REPRODUCED} for r in records if "event" not in r]
