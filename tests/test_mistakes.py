"""What people get wrong, and the line that each mistake gets: python -m pytest tests/test_mistakes.py

Exit code 2 for a mistake, one line on stderr that names the flag or the file and says what to do, never a traceback.
"""

import json
import os
import socket
import subprocess
import sys

import conftest
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import evaluate
import export_hf
import sample
import train_gpt2
from data import fineweb, inspect_shards, tokenize_text
from data.shards import write_shard
from model import GPT

PROGRAMS = {
    "train": train_gpt2.main,
    "sample": sample.main,
    "evaluate": evaluate.main,
    "export": export_hf.main,
    "fineweb": fineweb.main,
    "tokenize": tokenize_text.main,
    "inspect": inspect_shards.main,
}

HOLDS_A_RUN = (
    "--run_dir {run} holds a run: --config {run}/config.toml --resume auto goes on with it, or name another folder"
)

# the command (train has the flags of a small run before it), and its line; * stands for any text
MISTAKES = [
    # flags
    ("train --learning_rat=1", "unknown argument '--learning_rat': did you mean '--learning_rate'?"),
    ("train --max-steps 10", "unknown argument '--max-steps': did you mean '--max_steps'?"),
    ("train -max_steps 10", "unknown argument '-max_steps': did you mean '--max_steps'?"),
    ("train --lr 1e-4", "unknown argument '--lr': did you mean '--learning_rate'?"),
    ("train configs/tiny.toml", "unknown argument 'configs/tiny.toml': did you mean '--config configs/tiny.toml'?"),
    ("train softmax", "unknown argument 'softmax'; --help lists what there is"),
    ("train --max_steps", "argument --max_steps: expected one argument (--help lists the flags)"),
    ("train --compile", "argument --compile: expected one argument (--help lists the flags)"),
    ("train --max_steps many", "--max_steps should be a whole number, not 'many'"),
    ("train --max_steps 1e3", "--max_steps should be a whole number, not '1e3'"),
    ("train --max_steps -5", "--max_steps should be at least 0, not -5"),
    ("train --compile yes", "--compile should be true or false, not 'yes'"),
    ("train --deterministic True", "--deterministic should be true or false, not 'True'"),
    ("train --learning_rate 3e-4,", "--learning_rate should be a number, not '3e-4,'"),
    ("train --learning_rate inf", "--learning_rate should be a number, not inf"),
    ("train --attention flash", "--attention should be one of softmax, entmax, not 'flash'"),
    ("train --alpha 0.9", "--alpha should be from 1 to 2, not 0.9"),
    ("train --alpha 3", "--alpha should be from 1 to 2, not 3.0"),
    (
        "train --alpha_start 1.2",
        "--alpha_start has no effect without --alpha_steps, the steps that alpha takes to its end",
    ),
    ("train --alpha_start 0", "--alpha_start should be from 1 to 2, not 0.0"),
    (
        "train --model gpt2-small",
        "--model should be one of tiny, gpt2, gpt2-medium, gpt2-large, gpt2-xl, not 'gpt2-small'",
    ),
    ("train --dtype bf16", "--dtype should be one of float32, bfloat16, not 'bf16'"),
    ("train --device cuda:0", "--device should be one of auto, cpu, cuda, mps, not 'cuda:0'"),
    ("train --seed -1", "--seed should be from 0 to 9223372036854775807, not -1"),
    ("train --sequence_length 0", "--sequence_length should be from 1 to 1073741824, not 0"),
    # a configuration
    ("train --config nowhere.toml", "--config nowhere.toml: cannot be read (No such file or directory)"),
    ("train --config {shards}", "--config {shards}: cannot be read (Is a directory)"),
    ("train --config {run}/log.jsonl", "--config {run}/log.jsonl: not valid TOML: *"),
    ("train --config {here}/typo.toml", "--config {here}/typo.toml: unknown key 'max_step': did you mean 'max_steps'?"),
    ("train --config {here}/kind.toml", "--config {here}/kind.toml: max_steps should be a whole number, not '100'"),
    (
        "train --config {here}/table.toml",
        "--config {here}/table.toml: unknown key 'training': did you mean 'train_data'?",
    ),
    # numbers that do not go together
    (
        "train --max_steps 1",
        "warmup_steps 2 is longer than the run, max_steps 1: lower --warmup_steps too, say to 0",
    ),
    (
        "train --config {root}/configs/tiny.toml --warmup_steps 30 --max_steps 20",
        "warmup_steps 30 is longer than the run, max_steps 20: lower --warmup_steps too, say to 2",
    ),
    (
        "train --alpha_steps 20",
        "alpha_steps 20 is longer than the run, max_steps 8: it would not come to alpha 1.5; lower --alpha_steps too, "
        "say to 7",
    ),
    (
        "train --batch_size 10",
        "batch_size 10 is not a multiple of micro_batch_size 4 x 1 ranks = 4: use batch_size 8 or 12, or a smaller "
        "micro_batch_size",
    ),
    ("train --val_tokens 10", "val_tokens 10 is less than one sequence of 64"),
    # the data
    ("train --train_data nowhere", "train_data: no file matches nowhere"),
    (
        "train --train_data data/fineweb10B",
        "train_data: no file matches data/fineweb10B; python -m data.fineweb fetches FineWeb",
    ),
    ("train --train_data nowhere/*.bin", "train_data: no file matches nowhere/*.bin"),
    ("train --val_data {here}", "val_data: no *_val_*.bin or *_val_*.npy in the folder {here}"),
    ("train --train_data=", "train_data is empty: give a shard, a glob or a folder of shards"),
    (
        "train --train_data {here}/typo.toml",
        "{here}/typo.toml: 12 bytes, less than a shard's header (1024): make or fetch it again",
    ),
    (
        "train --train_data {run}/checkpoint_4",
        "{run}/checkpoint_4: starts with *, not the magic number 20240520 of an llm.c token shard (nanoGPT's, without "
        "a header, need --shard_format nanogpt)",
    ),
    (
        "train --train_data {here}/cut.bin",
        "{here}/cut.bin: the header promises 3001 tokens (7026 bytes), the file has 5000 bytes: truncated, empty or "
        "damaged; make or fetch it again",
    ),
    (
        "train --train_data {shards}/text_train_000001.bin --shard_format nanogpt",
        "{shards}/text_train_000001.bin: has the header of an llm.c token shard: use --shard_format auto",
    ),
    (
        "train --train_data {here}/gpt2_tokens.bin",
        "{here}/gpt2_tokens.bin: token id 50256, but the vocabulary has 257 ids: made with another "
        "--tokenizer, as gpt2, or damaged",
    ),
    (
        "train --sequence_length 8000",
        "{shards}/text_train_000001.bin: 7098 tokens in all, too few for one sequence of 8000: shorten sequence_length "
        "or add shards",
    ),
    ("train --hellaswag " + "x" * 300, "hellaswag: no file " + "x" * 300 + " (*"),
    ("tokenize --out {here}/out " + "x" * 300, "x" * 300 + ": no such file or folder*"),
    ("inspect " + "x" * 300, "x" * 300 + ": no shards there *"),
    ("evaluate --checkpoint=", "--checkpoint is empty: give a checkpoint's path"),
    (
        "sample --run_dir {run} --prompt -",
        "the prompt is to come from stdin, which is closed: give it by --prompt",
    ),
    (
        "train --hellaswag nowhere.jsonl",
        "hellaswag: no file nowhere.jsonl (a .jsonl file of the examples, or download)",
    ),
    # the machine
    ("train --device cuda", "device cuda: PyTorch sees no CUDA GPU here; use --device cpu"),
    (
        "train --device cuda --dtype bfloat16 --compile true",
        "device cuda: PyTorch sees no CUDA GPU here; use --device cpu",
    ),
    ("train --device mps", "device mps: not there; use --device cpu"),
    # runs and checkpoints
    ("train --run_dir {run}", HOLDS_A_RUN),
    ("train --run_dir {here}/typo.toml", "--run_dir {here}/typo.toml: cannot be written (File exists)"),
    ("train --run_dir /dev/null/x", "--run_dir /dev/null/x: cannot be written (Not a directory)"),
    ("train --run_dir " + "x" * 300, "--run_dir " + "x" * 300 + ": cannot be written (File name too long)"),
    ("train --resume auto", "--resume auto needs --run_dir, the folder of the run to go on with"),
    ("train --resume {run}", "--resume {run} is a folder: use --run_dir {run} --resume auto"),
    ("train --resume true", "--resume true: no such checkpoint (never, auto, or a checkpoint's path)"),
    (
        "train --run_dir {run} --resume auto --max_steps 9 --attention softmax --batch_size 8",
        "cannot resume step 4 with another configuration: attention was 'entmax', now 'softmax'; batch_size was 4, "
        "now 8",
    ),
    (
        "train --run_dir {run} --resume auto --max_steps 3",
        "cannot resume step 4 with another configuration: max_steps was 4, now 3",
    ),
    (
        "train --run_dir {run} --resume auto --train_data {shards}/*val*",
        "cannot resume step 4 with another configuration: train_data '{shards}/*val*' does not hold the shards that it "
        "held ('{shards}')",
    ),
    (
        "train --resume {here}/text",
        "{here}/text: damaged or not a checkpoint; take another one of its run",
    ),
    # other people's weights
    ("train --init_from ./nowhere", "init_from: no folder ./nowhere"),
    ("train --init_from gpt3", "init_from: no folder gpt3, and the hub gave *"),
    ("train --init_from {run}", "init_from: {run} is no GPT-2 with config.json and safetensors: *config.json'"),
    (
        "train --init_from {here}/llama",
        "init_from: {here}/llama/config.json has model_type = llama, this GPT-2 needs gpt2",
    ),
    ("train --init_from {hf} --tokenizer gpt2", "tokenizer gpt2 has 50257 ids, the model 257"),
    (
        "train --init_from {hf} --qk_init_scale 0.5",
        "qk_init_scale is for new weights, those of init_from are taken as they are: leave one out",
    ),
    (
        "train --init_from {hf} --model gpt2",
        "--model has no effect with init_from, which sets the size: leave one out",
    ),
    ("train --init_from {hf} --sequence_length 65", "sequence_length 65 is longer than the model's 64 positions"),
    ("evaluate --run_dir {run} --sequence_length 128", "sequence_length 128 is longer than the model's 64 positions"),
    # the other programs
    ("sample", "one of the arguments --run_dir --checkpoint is required (--help lists the flags)"),
    (
        "sample --run_dir {run} --checkpoint {run}/checkpoint_4",
        "argument --checkpoint: not allowed with argument --run_dir (--help lists the flags)",
    ),
    ("sample --run_dir nowhere", "--run_dir nowhere: no such folder"),
    ("sample --run_dir {here}", "--run_dir {here}: holds no sound checkpoint"),
    ("sample --checkpoint {run}", "{run}: no such checkpoint; --run_dir {run} takes the newest of a run"),
    ("sample --checkpoint {run}/checkpoint_5", "{run}/checkpoint_5: no such checkpoint"),
    (
        "sample --checkpoint {here}/pickle.pt",
        "{here}/pickle.pt: not a checkpoint of this version of the program (KeyError: 'step')",
    ),
    ("sample --run_dir {run} --tempature 1", "unknown argument '--tempature': did you mean '--temperature'?"),
    ("sample --run_dir {run} --temperature -1", "--temperature should be at least 0, not -1.0"),
    ("sample --run_dir {run} --top_p 90", "--top_p should be from 0 to 1, a share of the probability, not 90.0"),
    ("sample --run_dir {run} --top_p nan", "--top_p should be at least 0, not nan"),
    (f"sample --run_dir {{run}} --seed {10**30}", f"--seed should be a number of at most 64 bits, not {10**30}"),
    (
        "sample --run_dir {run} --prompt_file nowhere.txt",
        "--prompt_file nowhere.txt: cannot be read (No such file or directory)",
    ),
    ("sample --run_dir {run} --prompt_file {run}/checkpoint_4", "the prompt is not UTF-8 text: *"),
    ("sample --run_dir {run} --prompt \udcff", "the prompt is not UTF-8 text: *"),
    ("evaluate --run_dir {run} --val_data nowhere", "val_data: no file matches nowhere"),
    ("evaluate --run_dir {run} --alpha 2", "--alpha goes with --init_from: a checkpoint has its own"),
    ("export --run_dir {run}", "the following arguments are required: --out (--help lists the flags)"),
    ("export --run_dir {run} --out=", "--out is empty: name a folder"),
    ("export --run_dir {run} --out {here}/text", "--out {here}/text: cannot be written (File exists)"),
    ("export --run_dir {run} --out {hf}", "--out {hf} holds a model.safetensors: name another folder, or remove it"),
    ("export --run_dir {run} --out /dev/null/x", "--out /dev/null/x: cannot be written (Not a directory)"),
    ("export --run_dir {run} --out {here}/taken", "--out {here}/taken: cannot be written (*)"),
    ("fineweb --shards 104", "--shards should be from 0 to 103, not 104"),
    ("tokenize --tokenizer bytes --out {here}/out nowhere.txt", "*nowhere.txt*"),
    ("inspect nowhere", "nowhere: no shards there (a file, a glob, or a folder of *_train_* and *_val_* files)"),
]


@pytest.fixture(scope="module")
def places(flags, shards, tmp_path_factory):
    """Where the mistakes happen: the program's {root}, {shards}, a {run} of 4 steps, its weights as {hf}, {here}."""
    here = tmp_path_factory.mktemp("here")
    run = here / "run"
    train_gpt2.main([*flags, "--max_steps=4", "--val_every=0", f"--run_dir={run}"])
    export_hf.main(["--run_dir", str(run), "--out", str(here / "hf")])
    (here / "typo.toml").write_text("max_step = 3")
    (here / "kind.toml").write_text("max_steps = '100'")
    (here / "table.toml").write_text("[training]\nmax_steps = 3")
    (here / "text").write_text("some text")
    (here / "cut.bin").write_bytes((shards / "text_train_000001.bin").read_bytes()[:5000])
    write_shard(here / "gpt2_tokens.bin", np.full(5000, 50256, dtype=np.uint16))
    torch.save({"model": torch.zeros(3)}, here / "pickle.pt")
    (here / "taken" / "model.safetensors").mkdir(parents=True)
    (here / "llama").mkdir()
    (here / "llama" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"x": torch.zeros(1)}, here / "llama" / "model.safetensors")
    return {"root": ROOT, "shards": shards, "run": run, "hf": here / "hf", "here": here}


@pytest.fixture
def call(flags, tmp_path, monkeypatch, capsys):
    """Run a program in this process, in an empty folder: exit code, stdout, stderr."""

    def main(program, *args):
        return conftest.call(PROGRAMS[program], capsys, *(flags if program == "train" else ()), *args)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)  # as with nothing piped in
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return main


def assert_says(err, message):
    """That stderr is this one line, where * stands for any text."""
    assert err.endswith("\n") and "Traceback" not in err
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    line = line.removeprefix("error: ")
    parts = message.split("*")
    if len(parts) == 1 or line == message:  # some messages have an asterisk of their own
        assert line == message
        return
    assert line.startswith(parts[0]) and line.endswith(parts[-1]), line
    for part in parts:
        assert part in line
        line = line[line.index(part) + len(part) :]


@pytest.mark.parametrize("command, message", MISTAKES)
def test_each_mistake_gets_its_line(call, places, tmp_path, command, message):
    program, *args = (word.format(**places) for word in command.split())
    before = [(p, p.stat().st_mtime_ns) for p in sorted(places["here"].rglob("*")) if p.is_file()]
    code, out, err = call(program, *args)
    err = "".join(line for line in err.splitlines(True) if not line.startswith("reading "))  # a run's checkpoint
    assert code == 2, err
    assert_says(err, message.format(**places))
    assert before == [(p, p.stat().st_mtime_ns) for p in sorted(places["here"].rglob("*")) if p.is_file()]
    assert not any(tmp_path.iterdir())  # no run directory is left behind


def test_the_table_is_long_enough():
    assert len({message for _, message in MISTAKES}) >= 30


def test_a_prompt_longer_than_the_context_is_cut_with_a_notice(call, places):
    long, greedy = "the words " * 20, ["--temperature", 0, "--max_new_tokens", 5]
    code, out, err = call("sample", "--run_dir", places["run"], "--prompt", long, *greedy)
    assert code == 0 and out.startswith(long)
    assert "the prompt has 200 tokens, the context 64: the oldest are left out\n" in err
    short = call("sample", "--run_dir", places["run"], "--prompt", long[-64:], *greedy)
    assert short[0] == 0 and short[1] == out[-len(short[1]) :] and "context" not in short[2]


def test_no_warm_up_is_too_long_for_no_steps(call, tmp_path):
    assert call("train", "--max_steps=0", "--warmup_steps=1000", f"--run_dir={tmp_path / 'run'}")[0] == 0


CUDA_OOM = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.72 GiB of which 5 MiB is"
CPU_OOM = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"


@pytest.mark.parametrize(
    "command, error, message",
    [
        (
            "train --micro_batch_size 4 --batch_size 8",
            torch.OutOfMemoryError(CUDA_OOM),
            "out of memory (20.00 MiB more): use --micro_batch_size 2 instead of 4; the batches stay the same",
        ),
        (
            "train --micro_batch_size 24 --batch_size 24",
            RuntimeError(CPU_OOM),
            "out of memory (99 bytes more): use --micro_batch_size 12 instead of 24; the batches stay the same",
        ),
        (
            "train --micro_batch_size 5 --batch_size 5",
            MemoryError(),
            "out of memory: use --micro_batch_size 1 instead of 5; the batches stay the same",
        ),
        (
            "train --micro_batch_size 1",
            torch.OutOfMemoryError(CUDA_OOM),
            "out of memory (20.00 MiB more): micro_batch_size is 1: take a shorter sequence_length or a smaller model",
        ),
        (
            "evaluate --run_dir {run} --micro_batch_size 4",
            torch.OutOfMemoryError(CUDA_OOM),
            "out of memory (20.00 MiB more): use a --micro_batch_size below 4, or --device cpu",
        ),
        (
            "sample --run_dir {run} --prompt x",
            torch.OutOfMemoryError(CUDA_OOM),
            "out of memory (20.00 MiB more): see what else uses it (nvidia-smi), or use --device cpu",
        ),
    ],
)
def test_memory_that_is_too_small(call, places, monkeypatch, command, error, message):
    def forward(*args, **kwargs):
        raise error

    monkeypatch.setattr(GPT, "hidden", forward)
    code, _, err = call(*(word.format(**places) for word in command.split()), "--device=cpu")
    assert code == 2
    assert_says(err.splitlines(True)[-1], message)
    assert "Traceback" not in err


def test_torch_compile_without_a_compiler(call, monkeypatch):
    def forward(*args, **kwargs):
        cause = RuntimeError("No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')")
        raise torch._inductor.exc.InductorError(cause, None)

    monkeypatch.setattr(GPT, "forward", forward)
    code, _, err = call("train")
    assert code == 2
    message = "compile: torch.compile does not work here (*C++ compiler*): use --compile false"
    assert_says(err.splitlines(True)[-1], message)


# -----------------------------------------------------------------------------
# several processes


def test_too_few_gpus_for_the_processes(call, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    code, _, err = call("train", "--device=cuda")
    assert code == 2
    assert_says(err, "torchrun started process 3 on a machine of 2 GPUs: start one a GPU")


def test_what_a_launcher_has_to_say(call, monkeypatch):
    """A job script that sets the variables of torchrun by hand."""
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "two")
    code, _, err = call("train")
    assert code == 2
    assert_says(err, "RANK and WORLD_SIZE should be whole numbers, as torchrun sets them (*'two')")
    for rank, world_size in ((1, 1), (0, 0), (0, -1), (-1, 1)):
        monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", str(world_size))
        code, _, err = call("train")
        assert code == 2
        assert_says(err, f"RANK {rank} is none of WORLD_SIZE {world_size}: start with torchrun, or unset both")
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call("train")
    assert code == 2
    assert_says(err, "WORLD_SIZE is 2: * RANK *: start with torchrun, or unset it")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        code, _, err = call("train")
    assert code == 2
    lines = [line for line in err.splitlines(True) if line.startswith("error: ")]
    assert_says(lines[0], f"MASTER_PORT {port} is in use: take another, or torchrun --standalone")


def test_processes_say_the_same_mistake_once(run, flags, places):
    """Where all meet it, and where only process 0 does."""
    for wrong, message in (
        ("--batch_size=3", "error: batch_size 3 is not a multiple of micro_batch_size 1 x 2 ranks"),
        (f"--run_dir={places['run']}", f"error: --run_dir {places['run']} holds a run"),
    ):
        code, _, err = run("train_gpt2.py", *flags, "--micro_batch_size=1", wrong, ranks=2)
        assert code == 1 and err.count(message) == err.count("error: ") == 1, err  # torchrun's exit code is always 1
        assert 'train_gpt2.py", line' not in err, err  # torchrun adds a traceback of its own


ONE_ERRS = """
import os, cli
def main():
    raise cli.UserError(f"a mistake that process {os.environ['RANK']} meets" if os.environ["RANK"] == "1" else "all")
cli.run(main)
"""


def test_a_mistake_that_one_process_meets_is_not_lost(tmp_path):
    (tmp_path / "one.py").write_text(ONE_ERRS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", "one.py"]
    result = subprocess.run(launch, cwd=tmp_path, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    err = result.stderr.decode()
    assert err.count("error: a mistake that process 1 meets\n") == 1 and err.count("error: all\n") == 1, err


def test_a_port_in_use_under_torchrun():
    """It is torchrun that finds out, before any of our processes starts; its last line says so."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launch = [sys.executable, "-m", "torch.distributed.run", "--master_port", port, "train_gpt2.py"]
        result = subprocess.run([*launch, "--max_steps=0"], cwd=ROOT, capture_output=True)
    assert result.returncode == 1 and b"address already in use" in result.stderr.splitlines()[-1] and not result.stdout


def test_a_pipe_that_closes_early(run, places):
    command = [sys.executable, str(ROOT / "sample.py"), "--run_dir", str(places["run"]), "--max_new_tokens", "2000"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait() == 1
    assert err.splitlines()[1:] == ["stopped: nobody reads the output any more"], err


@pytest.mark.parametrize(
    "code, closed, expected",
    [("cli.say('“a”')", "", b"?a?\n"), ("print('a'), cli.say('b')", ">&-", b""), ("cli.notice('a')", ">&- 2>&-", b"")],
)
def test_outputs_that_know_few_characters_or_are_closed(code, closed, expected):
    command = [sys.executable, "-c", f"import cli; cli.run(lambda: [{code}])"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *command], cwd=ROOT, env=environment, capture_output=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, expected, b""), result


def test_the_wrong_tokenizer_is_refused_or_suspected(call, shards, tmp_path):
    """Byte shards have no id that GPT-2's vocabulary lacks; those of others may, or have no start of a document."""
    tokens = np.random.default_rng(0).integers(30000, size=1000).astype(np.uint16)
    for name, first, suspected in (("other", 7, True), ("gpt2", 50256, False)):
        tokens[0] = first
        write_shard(tmp_path / f"{name}.bin", tokens)
        flags = [f"--train_data={tmp_path}/{name}.bin", f"--val_data={tmp_path}/{name}.bin", "--tokenizer=gpt2"]
        code, _, err = call("train", "--max_steps=0", *flags, f"--run_dir={tmp_path / name}", "--val_tokens=64")
        assert code == 0 and ("no document starts (id 50256) in the first tokens of" in err) == suspected, err
        assert f"{tmp_path}/{name}.bin is in train_data and in val_data" in err, err
    for split in ("train", "val"):
        flags = [f"--train_data={tmp_path}/gpt2.bin", f"--val_data={tmp_path}/gpt2.bin", f"--{split}_data={shards}"]
        code, _, err = call("train", "--max_steps=0", *flags, "--tokenizer=gpt2", f"--run_dir={tmp_path / 'bytes'}")
        assert code == 2 and "holds bytes, use --tokenizer bytes" in err and not (tmp_path / "bytes").exists(), err
    code, _, err = call("evaluate", f"--run_dir={tmp_path / 'gpt2'}", f"--val_data={shards}", "--device=cpu")
    assert code == 2 and "holds bytes, use --tokenizer bytes" in err, err
