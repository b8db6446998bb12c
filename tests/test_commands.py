"""sample.py, evaluate.py and export_hf.py on a trained run.

python -m pytest tests/test_commands.py
"""

import json
import math
import shutil

import pytest
import torch
from conftest import ROOT, call, read_log
from transformers import GPT2LMHeadModel

import evaluate
import export_hf
import sample
from data.shards import TokenStream
from train_gpt2 import main as train

EACH_ITS_OWN = """
import os, sys
import cli, evaluate
cli.run(lambda: evaluate.main([f"--checkpoint={sys.argv[1]}/checkpoint_{40 - 2 * int(os.environ['RANK'])}"]))
"""


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory):
    """A trained run of each attention."""
    folder = tmp_path_factory.mktemp("runs")
    for attention in ("softmax", "entmax"):
        train([*flags, f"--attention={attention}", f"--run_dir={folder / attention}", "--max_steps=40"])
    return folder


@pytest.mark.parametrize("attention", ["softmax", "entmax"])
def test_sample_writes_prompt_and_continuation_alone(runs, run, attention):
    """In processes of their own: from a flag, a file and stdin, with and without the cache, past the context."""
    args = ["--run_dir", runs / attention, "--max_new_tokens", 100, "--temperature", 0]
    code, text, err = run("sample.py", *args, "--prompt", "the words ")
    assert code == 0, err
    assert text.startswith("the words ") and text.endswith("\n")
    assert 100 <= len(text) - len("the words \n") <= 100 * len("<|endoftext|>")
    assert "tokens/s" in err
    assert run("sample.py", *args, stdin="the words ")[:2] == (0, text)
    assert run("sample.py", *args, "--no_kv_cache", "--prompt", "the words ")[:2] == (0, text)


def test_sample_options(runs, tmp_path, capsys):
    checkpoint = ["--checkpoint", runs / "entmax" / "checkpoint_40", "--max_new_tokens", 30]
    (tmp_path / "prompt.txt").write_text("naïve ")
    from_file = call(sample.main, capsys, *checkpoint, "--prompt_file", tmp_path / "prompt.txt", "--seed", 7)
    assert from_file[0] == 0 and from_file[1].startswith("naïve ")
    again = call(sample.main, capsys, *checkpoint, "--prompt", "naïve ", "--seed", 7)
    other = call(sample.main, capsys, *checkpoint, "--prompt", "naïve ", "--seed", 8)
    assert from_file[1] == again[1] != other[1]
    code, out, err = call(sample.main, capsys, *checkpoint, "--prompt", "ab", "--num_samples", 3, "--temperature", 2)
    assert code == 0 and out.count("ab") >= 3 and out.count("\n") >= 3 and "sample 3 of 3" in err
    greedy = call(sample.main, capsys, *checkpoint, "--prompt", "ab", "--temperature", 0)
    assert greedy[1] == call(sample.main, capsys, *checkpoint, "--prompt", "ab", "--top_k", 1)[1]
    assert greedy[1] == call(sample.main, capsys, *checkpoint, "--prompt", "ab", "--top_p", 0)[1]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--prompt_file", "nowhere.txt"], "nowhere.txt"),
        (["--temperature", "-1", "--prompt", "x"], "--temperature"),
        (["--top_k", "x"], "--top_k"),
        (["--tempature", "1"], "did you mean '--temperature'"),
    ],
)
def test_sample_refuses_in_one_line(runs, capsys, wrong, words):
    code, out, err = call(sample.main, capsys, "--run_dir", runs / "softmax", *wrong)
    assert code == 2 and words in err and out == ""


def test_line_ends_of_a_prompt_stay(runs, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_bytes(b"a\r\nb")
    args = ["--run_dir", runs / "softmax", "--max_new_tokens", 0, "--prompt_file", tmp_path / "prompt.txt"]
    assert call(sample.main, capsys, *args)[1] == "a\r\nb\n"


def test_nothing_is_written_by_a_model_that_diverged(flags, tmp_path, capsys):
    changed = ["--learning_rate=1e10", "--warmup_steps=1", "--max_steps=3", "--sample_every=1", "--val_every=0"]
    code, _, err = call(train, capsys, *flags, *changed, f"--run_dir={tmp_path / 'run'}")
    assert code == 1 and "no sample after step 3: the logits of the model are not finite" in err, err
    assert err.splitlines()[-1].startswith(f"error: {tmp_path / 'run'}: the validation loss at the end is nan"), err
    for temperature in ("0", "1"):
        args = ["--run_dir", tmp_path / "run", "--prompt=a", "--temperature", temperature]
        code, _, err = call(sample.main, capsys, *args)
        assert code == 2 and "the logits of the model are not finite" in err.splitlines()[-1], err


@pytest.mark.parametrize("program", [sample, evaluate, export_hf])
def test_missing_runs_are_refused_in_one_line(program, tmp_path, capsys):
    out = ["--out", tmp_path / "out"] if program is export_hf else []
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no checkpoint")
    for source in (
        ["--run_dir", "nowhere"],
        ["--run_dir", tmp_path / "empty"],
        ["--checkpoint", tmp_path / "text"],
        [],
    ):
        code, _, err = call(program.main, capsys, *source, *out)
        assert code == 2 and err.count("\n") == 1, err


@pytest.mark.parametrize("attention", ["softmax", "entmax"])
def test_evaluate_repeats_the_runs_own_validation(runs, capsys, attention):
    code, out, err = call(evaluate.main, capsys, "--run_dir", runs / attention, "--json")
    assert code == 0, err
    result, logged = json.loads(out), read_log(runs / attention)[-1]
    assert result["step"] == 40 and result["val_tokens"] == logged["val_tokens"]
    assert result["val_loss"] == pytest.approx(logged["val_loss"], rel=1e-6)
    small = call(evaluate.main, capsys, "--run_dir", runs / attention, "--json", "--micro_batch_size", 3)[1]
    assert json.loads(small)["val_loss"] == pytest.approx(result["val_loss"], rel=1e-6)


def test_losses_beyond_all_numbers(runs, capsys, monkeypatch):
    for loss, perplexity in ((3e9, "inf"), (math.nan, "nan")):
        monkeypatch.setattr(evaluate, "validate", lambda *_, loss=loss, **__: (loss, None))
        code, out, err = call(evaluate.main, capsys, "--run_dir", runs / "softmax")
        assert code == 0 and f"validation loss {loss:.4f} nats a token (perplexity {perplexity})" in out, err
    assert json.loads(call(evaluate.main, capsys, "--run_dir", runs / "softmax", "--json")[1])["val_loss"] is None


def test_evaluate_spreads_over_ranks(runs, run):
    args = ["--run_dir", runs / "entmax", "--json", "--micro_batch_size", 3]
    (_, one, _), (code, two, err) = run("evaluate.py", *args), run("evaluate.py", *args, ranks=2)
    assert code == 0, err
    assert json.loads(two)["val_loss"] == pytest.approx(json.loads(one)["val_loss"], rel=1e-9)


def test_exported_weights_have_the_same_loss_in_transformers(runs, shards, tmp_path, capsys):
    assert call(export_hf.main, capsys, "--run_dir", runs / "softmax", "--out", tmp_path / "hf")[0] == 0
    hf = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").double().eval()
    stream = TokenStream([shards / "text_val_000000.bin"], 64, 257)
    batch = torch.from_numpy(stream.batch(range(20)))
    logits = hf(batch[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item()
    tokens = ["--val_data", shards, "--val_tokens", 20 * 64, "--json"]
    for source in (["--run_dir", runs / "softmax"], ["--init_from", tmp_path / "hf"]):
        code, out, err = call(evaluate.main, capsys, *source, *tokens)
        assert code == 0, err
        assert json.loads(out)["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_processes_that_evaluate_different_things_are_refused(runs, run, tmp_path):
    (tmp_path / "each.py").write_text(EACH_ITS_OWN)
    code, out, err = run(tmp_path / "each.py", runs / "softmax", ranks=2, env={"PYTHONPATH": str(ROOT)})
    assert code == 1 and not out and "the checkpoint's step is 40 on process 0, 38 on process 1" in err, err


def test_others_may_read_what_is_exported(runs, tmp_path, capsys):
    assert call(export_hf.main, capsys, "--run_dir", runs / "softmax", "--out", tmp_path / "hf")[0] == 0
    assert len({path.stat().st_mode for path in (tmp_path / "hf").iterdir()}) == 1


def test_training_goes_on_from_exported_weights(runs, flags, tmp_path, capsys):
    code, _, err = call(export_hf.main, capsys, "--run_dir", runs / "entmax", "--out", tmp_path / "hf")
    assert code == 0 and "entmax" in err
    train([*flags, f"--init_from={tmp_path / 'hf'}", f"--run_dir={tmp_path / 'tuned'}", "--max_steps=0"])
    before, after = read_log(runs / "entmax")[-1], read_log(tmp_path / "tuned")[-1]
    assert after["val_loss"] == pytest.approx(before["val_loss"], rel=1e-6)
    for wrong, word in (("--tokenizer=gpt2", "257"), ("--sequence_length=128", "64 positions")):
        code, _, err = call(train, capsys, *flags, f"--init_from={tmp_path / 'hf'}", wrong)
        assert code == 2 and word in err


def test_a_run_whose_newest_checkpoint_is_damaged_still_samples(runs, tmp_path, capsys):
    shutil.copytree(runs / "softmax", tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint_40"
    newest.write_bytes(newest.read_bytes()[:5000])
    code, out, err = call(sample.main, capsys, "--run_dir", tmp_path / "run", "--prompt", "x", "--max_new_tokens", 3)
    assert code == 0 and out.startswith("x") and "checkpoint_40 is damaged" in err and "checkpoint_38" in err
