"""The trainer as its users meet it: real processes, torchrun, kill -9, wrong input.

python -m pytest tests/test_train.py
"""

import json
import math
import shutil
import signal
import time
import tomllib
from dataclasses import asdict

import conftest
import numpy as np
import pytest
import torch
from conftest import ROOT, read_log

from checkpoint import checkpoints, load_model
from data.shards import TokenStream, find_shards, write_shard
from model import GPT, GPTConfig
from train_gpt2 import (
    Config,
    Gradients,
    Machine,
    add_gradients,
    compile_model,
    entmax_alpha,
    learning_rate,
    main,
    make_optimizer,
    parse_config,
    start_machine,
)


def losses(run_dir, key="train_loss"):
    return [record[key] for record in read_log(run_dir) if key in record]


def test_the_default_run_learns(run, tmp_path):
    """No argument at all: shards, training, validation, samples, checkpoint. The README's first command."""
    code, out, err = run("train_gpt2.py")
    assert code == 0, err
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("tiny-entmax-")
    loss = losses(run_dir, "val_loss")
    assert 5.0 < loss[0] < 5.8 and loss[-1] < 2.4
    assert list(checkpoints(run_dir))[-1] == 300
    assert "a sample after 300 steps" in out and f"validation loss {loss[-1]:.4f}" in out
    assert "ETA" in err and "Traceback" not in err
    seconds = sum(json.loads(line).get("step_ms", 0) for line in (run_dir / "log.jsonl").read_text().splitlines()) / 1e3
    print(f"{seconds:.0f} s of training steps")


ATTENTIONS = {
    "softmax": ["--attention=softmax"],
    "entmax": ["--attention=entmax"],
    "annealed": ["--attention=entmax", "--alpha_start=1", "--alpha_steps=7", "--qk_init_scale=0.5"],
}


@pytest.fixture(scope="module")
def whole_runs(flags, tmp_path_factory):
    """A run of each kind that nothing interrupts, one thread, in a process of its own."""
    import os
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("whole")
    for attention, its_flags in ATTENTIONS.items():
        command = [sys.executable, str(ROOT / "train_gpt2.py"), *flags, *its_flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, f"--run_dir={folder / attention}"], check=True, capture_output=True, env=environment)
    return folder


def test_log_holds_what_the_contract_says(whole_runs):
    for attention in ("softmax", "entmax"):
        records = [json.loads(line) for line in (whole_runs / attention / "log.jsonl").read_text().splitlines()]
        assert records[0]["step"] == 0 and records[0]["world_size"] == 1 and records[0]["torch"]
        training = [r for r in records if "train_loss" in r]
        assert [r["step"] for r in training] == list(range(1, 9))
        assert [r["tokens"] for r in training] == [256 * s for s in range(1, 9)]
        keys = {
            "step",
            "tokens",
            "train_loss",
            "grad_norm",
            "lr",
            "step_ms",
            "tokens_per_s",
            "mfu",
            "peak_memory_bytes",
        }
        assert all(set(r) == keys | ({"alpha"} if attention == "entmax" else set()) for r in training)
        assert all(r["mfu"] is None and r["peak_memory_bytes"] is None for r in training)
        validation = [r for r in records if "val_loss" in r]
        assert [r["step"] for r in validation] == [0, 4, 8]
        assert all(r["val_tokens"] == 1024 and r["val_ms"] > 0 for r in validation)
        assert list(checkpoints(whole_runs / attention)) == [6, 8]  # the last two
        assert validation[-1]["val_loss"] < validation[0]["val_loss"]


def test_the_last_evaluation_is_kept_by_sequence(whole_runs, shards):
    for attention in ("softmax", "entmax"):
        kept = np.load(whole_runs / attention / "evaluation.npz", allow_pickle=False)
        assert kept["step"] == 8 and kept["sequence_length"] == 64 and kept["val_losses"].shape == (16,)
        assert kept["val_losses"].mean() == pytest.approx(losses(whole_runs / attention, "val_loss")[-1], rel=1e-12)
        assert kept["hellaswag"] == "" and kept["hellaswag_right"].shape == (0,)
        assert kept["val_data"] == TokenStream(find_shards(str(shards), "val", "val_data"), 64, 257).fingerprint()
        model = load_model(torch.load(whole_runs / attention / "checkpoint_8", weights_only=True))
        stream = TokenStream(sorted(shards.glob("*_val_*")), 64, 257)
        for w in (0, 7, 15):
            tokens = torch.from_numpy(stream.batch([w]))
            with torch.no_grad():
                loss = model(tokens[:, :-1], tokens[:, 1:]).mean().item()
            assert kept["val_losses"][w] == pytest.approx(loss, rel=1e-5)


def test_config_toml_runs_the_same_again(whole_runs, run, tmp_path):
    saved = tomllib.loads((whole_runs / "entmax" / "config.toml").read_text())
    assert set(saved) == set(Config.__dataclass_fields__) - {"run_dir", "resume"}
    code, out, err = run("train_gpt2.py", "--config", whole_runs / "entmax" / "config.toml", "--run_dir", "again")
    assert code == 0, err
    assert read_log(tmp_path / "again") == read_log(whole_runs / "entmax")
    assert (tmp_path / "again" / "config.toml").read_text() in out


@pytest.mark.parametrize("attention, ranks, micro_batch_size", [("softmax", 2, 1), ("entmax", 2, 2), ("entmax", 1, 1)])
def test_ranks_and_micro_batches_change_nothing(whole_runs, run, flags, tmp_path, attention, ranks, micro_batch_size):
    changed = [f"--attention={attention}", f"--micro_batch_size={micro_batch_size}", "--run_dir=split"]
    code, _, err = run("train_gpt2.py", *flags, *changed, ranks=ranks)
    assert code == 0, err
    for key in ("train_loss", "val_loss", "grad_norm"):
        np.testing.assert_allclose(losses(tmp_path / "split", key), losses(whole_runs / attention, key), rtol=2e-5)


def test_kernels_train_in_two_processes_as_the_reference_in_one(run, flags, tmp_path):
    pytest.importorskip("triton")
    short = ["--max_steps=2", "--batch_size=2", "--val_every=0", "--val_tokens=128"]
    for name, ranks, env in (("kernels", 2, {"TRITON_INTERPRET": "1"}), ("reference", 1, {})):
        changed = [*short, f"--micro_batch_size={2 // ranks}", f"--run_dir={name}"]
        code, _, err = run("train_gpt2.py", *flags, *changed, ranks=ranks, env=env)
        assert code == 0, err
    for key in ("train_loss", "val_loss", "grad_norm"):
        np.testing.assert_allclose(losses(tmp_path / "kernels", key), losses(tmp_path / "reference", key), rtol=2e-5)


def wait_for_step(run_dir, step, process):
    """Return once the log has a training record of that step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        log = run_dir / "log.jsonl"
        if log.exists() and f'"step": {step}, "tokens"' in log.read_text():
            return
        time.sleep(0.005)
    pytest.fail(f"no step {step}: {process.communicate()[1].decode()}")


@pytest.mark.parametrize("attention, kills", [("softmax", [5]), ("entmax", [1, 4, 7]), ("annealed", [3])])
def test_killed_and_resumed_is_as_if_never_killed(whole_runs, start, run, flags, tmp_path, attention, kills):
    command = ["train_gpt2.py", *flags, *ATTENTIONS[attention], "--run_dir=killed", "--resume=auto"]
    for step in kills:
        process = start(*command)
        wait_for_step(tmp_path / "killed", step, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    code, _, err = run(*command)
    assert code == 0, err
    assert read_log(tmp_path / "killed") == read_log(whole_runs / attention)
    state, expected = (
        torch.load(folder / "checkpoint_8", weights_only=True)
        for folder in (tmp_path / "killed", whole_runs / attention)
    )
    assert all(torch.equal(state["model"][name], expected["model"][name]) for name in expected["model"])
    code, _, err = run(*command)
    assert code == 0 and "finished" in err


def test_damaged_checkpoints_are_passed_over(whole_runs, run, flags, tmp_path):
    shutil.copytree(whole_runs / "entmax", tmp_path / "damaged")
    whole = (tmp_path / "damaged" / "checkpoint_8").read_bytes()
    middle = len(whole) // 2
    damaged = {
        "checkpoint_8": whole[:-1000],  # cut short
        "checkpoint_7": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],  # one bit
        "checkpoint_9.tmp": whole[:middle],  # a kill while writing
    }
    for name, content in damaged.items():
        (tmp_path / "damaged" / name).write_bytes(content)
    code, _, err = run("train_gpt2.py", *flags, "--run_dir=damaged", "--resume=auto")
    assert code == 0, err
    assert "checkpoint_8 is damaged" in err and "checkpoint_7 is damaged" in err
    assert read_log(tmp_path / "damaged") == read_log(whole_runs / "entmax")
    (kept,) = (tmp_path / "damaged").glob("log-*.jsonl")  # what was known of the steps that are done again
    assert kept.read_text() == (whole_runs / "entmax" / "log.jsonl").read_text()


def test_a_damaged_log_is_kept(whole_runs, flags, tmp_path, capsys):
    shutil.copytree(whole_runs / "entmax", tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    lines = log.read_text().splitlines()
    lines[5] = lines[5][:10]
    log.write_text("\n".join(lines) + "\n")
    code, err = call(capsys, *flags, f"--run_dir={tmp_path / 'run'}", "--resume=auto", "--max_steps=9")
    (kept,) = log.parent.glob("log-*.jsonl")
    assert code == 0 and f"log.jsonl as it was, damaged in line 6, is kept as {kept}" in err
    assert kept.read_text().splitlines() == lines and read_log(tmp_path / "run")[-1]["step"] == 9


def test_resume_from_a_named_checkpoint_forks_the_run(whole_runs, run, flags, tmp_path):
    path = whole_runs / "entmax" / "checkpoint_6"
    code, _, err = run("train_gpt2.py", *flags, f"--resume={path}", "--run_dir=fork", "--micro_batch_size=2")
    assert code == 0, err
    # it goes on from there again, should it be killed before a checkpoint of its own
    assert (tmp_path / "fork" / "checkpoint_6").read_bytes() == path.read_bytes()
    fork, whole = read_log(tmp_path / "fork"), read_log(whole_runs / "entmax")
    assert [r for r in fork if r["step"] <= 6] == [r for r in whole if r["step"] <= 6]
    np.testing.assert_allclose(losses(tmp_path / "fork"), losses(whole_runs / "entmax"), rtol=2e-5)
    # another spelling of the path and a longer run may differ, and the line says what the latter means
    longer = ["--run_dir=fork", "--resume=auto", "--max_steps=9"]
    shards = next(flag for flag in flags if flag.startswith("--train_data")).split("=")[1]
    code, _, err = run("train_gpt2.py", *flags, *longer, f"--train_data={shards}/../{shards.split('/')[-1]}/*train*")
    assert code == 0, err
    assert "the end of the learning-rate schedule moves" in err
    assert [r["step"] for r in read_log(tmp_path / "fork") if "train_loss" in r] == list(range(1, 10))


def call(capsys, *flags):
    """main() in this process: exit code and stderr."""
    return conftest.call(main, capsys, *flags)[::2]


def assert_one_line(code, err, *words):
    assert code == 2, err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--learning_rat=1"], ["--learning_rat", "learning_rate"]),
        (["--max_steps=many"], ["--max_steps", "whole number", "many"]),
        (["--max_steps=1.5"], ["--max_steps", "1.5"]),
        (["--max_steps"], ["--max_steps"]),
        (["--compile=1"], ["--compile", "true or false"]),
        (["--alpha=0.9"], ["--alpha", "from 1 to 2", "0.9"]),
        (["--alpha=3"], ["--alpha", "3"]),
        (["--alpha=nan"], ["--alpha", "nan"]),
        (["--sequence_length=0"], ["--sequence_length", "0"]),
        (["--attention=sparse"], ["--attention", "softmax", "entmax"]),
        (["--config=nowhere.toml"], ["--config", "nowhere.toml"]),
        (["--train_data=nowhere"], ["train_data", "nowhere"]),
        (["--val_data="], ["val_data"]),
        (["--val_tokens=10"], ["val_tokens", "10"]),
        (["--sequence_length=8000"], ["too few", "sequence_length"]),
        (["--micro_batch_size=3"], ["batch_size 4", "use batch_size 3 or 6"]),
        (["--resume=auto"], ["--run_dir"]),
        (["--resume=nowhere"], ["--resume", "nowhere"]),
        (["--init_from=./nowhere"], ["init_from", "nowhere"]),
        (["stray"], ["stray"]),
    ],
)
def test_wrong_input_gets_one_line(flags, tmp_path, monkeypatch, capsys, wrong, words):
    monkeypatch.chdir(tmp_path)
    assert_one_line(*call(capsys, *flags, *wrong), *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "text, words",
    [
        ("max_step = 3", ["max_step", "did you mean 'max_steps'"]),
        ("max_steps = '3x'", ["max_steps", "3x"]),
        ("max_steps = true", ["max_steps", "True"]),
        ("compile = 'yes'", ["compile", "yes"]),
        ("learning_rate = [1]", ["learning_rate"]),
        ("alpha = 2.5", ["alpha", "2.5"]),
        ("alpha = = 2", ["TOML"]),
        ("\xff", ["TOML"]),
    ],
)
def test_wrong_config_gets_one_line_with_its_file(tmp_path, capsys, text, words):
    (tmp_path / "bad.toml").write_bytes(text.encode("latin-1"))
    assert_one_line(*call(capsys, f"--config={tmp_path / 'bad.toml'}"), "bad.toml", *words)


def test_wrong_shards_get_one_line_with_their_file(run, flags, tmp_path):
    write_shard(tmp_path / "x_train_1.bin", np.full(5000, 256, dtype=np.uint16))
    whole = (tmp_path / "x_train_1.bin").read_bytes()
    for name, content in {"cut": whole[:-2], "magic": b"\0" * 2000, "empty": b""}.items():
        (tmp_path / f"{name}.bin").write_bytes(content)
        code, _, err = run("train_gpt2.py", *flags, f"--train_data={name}.bin")
        assert_one_line(code, err, f"{name}.bin")
    write_shard(tmp_path / "big.bin", np.full(5000, 50000, dtype=np.uint16))
    code, _, err = run("train_gpt2.py", *flags, "--train_data=big.bin")
    assert_one_line(code, "\n".join(err.splitlines()[-1:]) + "\n", "big.bin", "50000", "257")


def test_a_run_is_not_overwritten(whole_runs, flags, capsys):
    before = (whole_runs / "entmax" / "log.jsonl").read_bytes()
    assert_one_line(*call(capsys, *flags, f"--run_dir={whole_runs / 'entmax'}"), "entmax", "--resume")
    assert (whole_runs / "entmax" / "log.jsonl").read_bytes() == before


def test_the_log_of_a_run_without_checkpoints_is_kept(whole_runs, flags, tmp_path, capsys):
    shutil.copytree(whole_runs / "softmax", tmp_path / "run")
    for path in checkpoints(tmp_path / "run").values():
        path.unlink()
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    code, err = call(capsys, *flags, "--max_steps=2", f"--run_dir={tmp_path / 'run'}", "--resume=auto")
    (old,) = (tmp_path / "run").glob("log-*.jsonl")
    assert code == 0 and f"kept as {old}" in err and old.read_bytes() == before
    assert [r["step"] for r in read_log(tmp_path / "run") if "train_loss" in r] == [1, 2]


def test_another_configuration_is_not_resumed(whole_runs, shards, flags, tmp_path, capsys):
    resume = [*flags, f"--run_dir={whole_runs / 'entmax'}", "--resume=auto"]
    changed = ["--learning_rate=0.5", "--batch_size=8", "--alpha=1.25"]
    words = ["learning_rate was 0.002, now 0.5", "batch_size was 4, now 8", "alpha was 1.5, now 1.25"]
    assert_one_line(*call(capsys, *resume, *changed), *words)
    assert_one_line(*call(capsys, *resume, "--max_steps=7"), "max_steps was 8, now 7")
    one_shard = f"--train_data={shards}/text_train_000001.bin"
    assert_one_line(*call(capsys, *resume, one_shard), "train_data", "text_train_000001.bin", str(shards))
    # with softmax the entmax fields are ignored
    softmax = [*flags, f"--run_dir={whole_runs / 'softmax'}", "--resume=auto", "--attention=softmax", "--alpha=1.25"]
    code, err = call(capsys, *softmax)
    assert code == 0 and "finished" in err


def test_no_steps_validates_and_stops(whole_runs, flags, tmp_path, capsys):
    code, err = call(capsys, *flags, "--max_steps=0", f"--run_dir={tmp_path / 'zero'}")
    assert code == 0, err
    np.testing.assert_allclose(
        losses(tmp_path / "zero", "val_loss"), losses(whole_runs / "entmax", "val_loss")[:1], 1e-6
    )
    assert list(checkpoints(tmp_path / "zero")) == [0]


def test_starts_in_the_same_second_do_not_collide(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert call(capsys, *flags, "--max_steps=0", "--val_tokens=64")[0] == 0
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_runs_cannot_be_made(flags, tmp_path, monkeypatch, capsys):
    """As where `runs` is a link to a disk that is not there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(tmp_path / "nowhere" / "runs")
    assert_one_line(*call(capsys, *flags), "runs/tiny-entmax-", "cannot be made", "--run_dir")


def test_fewer_validation_tokens_than_asked_are_all_used(shards, flags, tmp_path, capsys):
    code, err = call(capsys, *flags, "--max_steps=0", "--val_tokens=100000", f"--run_dir={tmp_path / 'all'}")
    assert code == 0 and "2311 tokens, not val_tokens = 100000" in err
    (record,) = [r for r in read_log(tmp_path / "all") if "val_loss" in r]
    assert record["val_tokens"] == 2310 // 64 * 64


def test_steps_without_a_finite_loss_are_skipped_then_training_stops(flags, tmp_path, capsys):
    changed = ["--learning_rate=1e30", "--max_steps=100", "--val_every=3", "--checkpoint_every=0", "--warmup_steps=0"]
    code, err = call(capsys, *flags, *changed, f"--run_dir={tmp_path / 'blown'}")
    assert code == 1 and "10 steps in a row" in err and "checkpoint_1" in err
    assert [r["val_loss"] for r in read_log(tmp_path / "blown") if "val_loss" in r][1:] == [None] * 3  # NaN is no JSON
    records = [r for r in read_log(tmp_path / "blown") if "train_loss" in r]
    assert ["skipped" in r for r in records] == [False] + [True] * 10
    assert math.isfinite(records[0]["train_loss"]) and records[1]["train_loss"] is None
    assert list(checkpoints(tmp_path / "blown")) == [1]


def test_the_weights_from_before_are_kept(flags, tmp_path, capsys):
    """Though checkpoints of the steps without effect are newer."""
    changed = ["--learning_rate=1e30", "--max_steps=100", "--val_every=0", "--checkpoint_every=2", "--warmup_steps=0"]
    code, err = call(capsys, *flags, *changed, "--keep_checkpoints=2", f"--run_dir={tmp_path / 'blown'}")
    assert code == 1 and "blown/checkpoint_1;" in err and 1 in checkpoints(tmp_path / "blown")


def test_schedule():
    config = parse_config(["--learning_rate=1", "--warmup_steps=10", "--max_steps=110", "--final_lr_fraction=0.1"])
    rates = [learning_rate(config, step) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.1 * s for s in range(1, 11)])
    assert rates[10] == 1 and rates[60] == pytest.approx(0.55) and 0.1 < rates[-1] < 0.101
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    flat = parse_config(["--learning_rate=1", "--warmup_steps=0", "--max_steps=2", "--final_lr_fraction=1"])
    assert [learning_rate(flat, step) for step in (1, 2)] == [1, 1]


def test_alpha_goes_in_a_straight_line_and_stays(whole_runs):
    records = [r for r in read_log(whole_runs / "annealed") if "train_loss" in r]
    assert [r["alpha"] for r in records] == pytest.approx([1 + 0.5 * step / 7 for step in range(8)])
    # a checkpoint on the way answers with the alpha of its step
    states = [torch.load(path, weights_only=True) for path in checkpoints(whole_runs / "annealed").values()]
    assert {s["step"]: s["gpt_config"]["alpha"] for s in states} == pytest.approx({6: 1 + 3 / 7, 8: 1.5})
    config = parse_config(["--alpha_start=1.1", "--alpha_steps=200"])
    assert [entmax_alpha(config, step) for step in (0, 50, 200, 300)] == pytest.approx([1.1, 1.2, 1.5, 1.5])
    assert entmax_alpha(parse_config([]), 0) == 1.5


def test_the_papers_recipe():
    config = parse_config(["--config", str(ROOT / "configs/gpt2_124m.toml"), "--attention=softmax"])
    assert (config.model, config.sequence_length, config.batch_size, config.warmup_steps) == ("gpt2", 1024, 512, 700)
    assert (config.learning_rate, config.weight_decay, config.grad_clip, config.max_steps) == (6e-4, 0.1, 1.0, 18865)
    assert learning_rate(config, 700) == 6e-4 and learning_rate(config, 18865) < 1e-10
    for ranks, micro_batch_size in ((1, 16), (8, 64)):
        assert config.batch_size % (ranks * micro_batch_size) == 0
    annealed = parse_config(["--config", str(ROOT / "configs/gpt2_124m_annealed.toml"), "--attention=softmax"])
    others = {"alpha_start": 1.1, "alpha_steps": 18865 * 9 // 10, "qk_init_scale": 0.5}
    assert asdict(annealed) == asdict(config) | others


def test_weight_decay_is_for_matrices_and_embeddings():
    from model import GPT, GPTConfig

    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=257))
    optimizer = make_optimizer(model, Config())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        plain = name.endswith("bias") or ".ln_" in f".{name}"
        assert decay[id(parameter)] == (0 if plain else 0.1), name
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_help_explains_every_field(run):
    code, out, _ = run("train_gpt2.py", "--help")
    assert code == 0
    assert all(f"--{name} " in out for name in Config.__dataclass_fields__)
    assert '["data/python_stdlib"]' in out and "[300]" in out


def test_help_shows_a_value_as_it_is(tmp_path, capsys):
    (tmp_path / "a.toml").write_text('run_dir = "100%(dest)s"')
    code, out, _ = conftest.call(main, capsys, f"--config={tmp_path / 'a.toml'}", "--help")
    assert code == 0 and '["100%(dest)s"]' in out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ["softmax", "entmax"])
def test_killed_and_resumed_on_a_gpu_deterministically(start, run, flags, tmp_path, attention):
    gpu = ["--device=cuda", "--dtype=bfloat16", "--deterministic=true", "--compile=true", f"--attention={attention}"]
    code, _, err = run("train_gpt2.py", *flags, *gpu, "--run_dir=whole")
    assert code == 0, err
    command = ["train_gpt2.py", *flags, *gpu, "--run_dir=killed", "--resume=auto"]
    process = start(*command)
    wait_for_step(tmp_path / "killed", 5, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, _, err = run(*command)
    assert code == 0, err
    assert read_log(tmp_path / "killed") == read_log(tmp_path / "whole")


def check_that_gradients_add_up(attention, device, compiled, fold):
    """Over the micro-batches of a step, and anew in each step."""
    machine = start_machine(device, "float32")
    torch.set_float32_matmul_precision("highest")  # which was TF32 by then
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(257, (9, 4, 65), generator=draw).to(machine.device)
    model = GPT(GPTConfig(2, 2, 32, 64, 257, attention))
    model.init_weights(draw)
    run_model = compile_model(model.to(machine.device)) if compiled else model
    gradients = Gradients(model, machine, fold)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    micro_batches = ((x[:, :-1], x[:, 1:]) for x in tokens)
    for step in range(3):  # runs the kernels one by one, then records them, then replays them
        loss = add_gradients(run_model, gradients, micro_batches, 3, machine)
        expected_loss = torch.stack([model(x[:, :-1], x[:, 1:]).mean() for x in tokens[3 * step : 3 * step + 3]]).mean()
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
        expected = torch.autograd.grad(expected_loss, list(model.parameters()))
        for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
            assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-8, name
        with torch.no_grad():
            for parameter in model.parameters():  # the next step's are of other weights
                parameter += 0.01 * torch.randn(parameter.shape, generator=draw).to(machine.device)
    with torch.no_grad():
        run_model(tokens[0][:, :-1], tokens[0][:, 1:])
    # one for training, one for validation
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + (2 if compiled else 0)


@pytest.mark.parametrize(
    "attention, compiled, fold",
    [("softmax", False, False), ("entmax", False, False), ("entmax", False, True), ("softmax", True, True)],
)
def test_gradients_add_up(attention, compiled, fold):
    check_that_gradients_add_up(attention, "cpu", compiled, fold)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ["softmax", "entmax"])
def test_gradients_of_cuda_graphs_add_up_on_a_gpu(attention):
    """Though a graph overwrites what it returned."""
    check_that_gradients_add_up(attention, "cuda", compiled=True, fold=True)


def check_gradients_by_rounded_weights(attention, device, compiled):
    """Are, in bfloat16, those of float32 up to its noise, step by step."""
    draw = torch.Generator().manual_seed(0)
    model, tokens = GPT(GPTConfig(3, 2, 64, 64, 257, attention)), torch.randint(257, (6, 8, 65), generator=draw)
    model.init_weights(draw)
    model, tokens = model.to(device), tokens.to(device)
    found = []
    for autocast in (False, True):
        machine = Machine(torch.device(device), autocast=autocast)
        gradients = Gradients(model, machine, fold=True)
        assert {x.dtype for x in gradients.weights if x.dim() == 2} == {(torch.float32, torch.bfloat16)[autocast]}
        run_model, micro_batches = compile_model(model) if compiled else model, ((x[:, :-1], x[:, 1:]) for x in tokens)
        for _ in range(3):
            add_gradients(run_model, gradients, micro_batches, 2, machine)
            found.append([p.grad.clone() for p in model.parameters()])
    for expected, got in zip(found[:3], found[3:], strict=True):
        for (name, _), x, y in zip(model.named_parameters(), expected, got, strict=True):
            assert 0 < (y - x).norm() <= 0.05 * x.norm(), name


@pytest.mark.parametrize("attention", ["softmax", "entmax"])
def test_gradients_by_rounded_weights(attention):
    check_gradients_by_rounded_weights(attention, "cpu", compiled=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ["softmax", "entmax"])
def test_gradients_by_rounded_weights_in_cuda_graphs(attention):
    check_gradients_by_rounded_weights(attention, "cuda", compiled=True)
