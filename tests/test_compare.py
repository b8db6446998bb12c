"""compare.py on runs of both attentions and two seeds: every number by another way, and what each mistake gets.

python -m pytest tests/test_compare.py
"""

import csv
import io
import json
import math
import os
import shutil
import statistics
import warnings

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import read_log
from matplotlib.colors import to_rgb
from matplotlib.image import imread

import checkpoint
import cli
import compare
from train_gpt2 import main as train

KINDS = [(attention, seed) for attention in ("softmax", "entmax") for seed in (1, 2)]
WINDOWS = 16  # of 64 tokens


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory):
    """A folder of four runs, {attention}-{seed}; those of seed 2 answered HellaSwag."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcde "), size=rng.integers(4, 20))) for _ in range(30 * 5)]
    examples = tmp_path_factory.mktemp("hellaswag") / "val.jsonl"
    with open(examples, "w") as file:
        for context, *endings in zip(*[iter(words)] * 5, strict=True):
            file.write(json.dumps({"ctx": context, "endings": endings, "label": int(rng.integers(4))}) + "\n")
    for attention, seed in KINDS:
        args = [*flags, f"--attention={attention}", f"--seed={seed}", f"--run_dir={folder}/{attention}-{seed}"]
        train([*args, "--checkpoint_every=0", f"--hellaswag={examples if seed == 2 else ''}", "--hellaswag_every=0"])
    return folder


@pytest.fixture(scope="module")
def losses(runs, shards):
    """{run's name: (windows,) float64}, by the logits and nothing else of the program."""
    tokens = np.fromfile(shards / "text_val_000000.bin", dtype="<u2", offset=1024).astype(np.int64)
    batch = torch.from_numpy(np.stack([tokens[64 * w : 64 * w + 65] for w in range(WINDOWS)]))
    result = {}
    for run_dir in runs.iterdir():
        model = checkpoint.load_model(torch.load(run_dir / "checkpoint_8", weights_only=True)).double()
        with torch.no_grad():
            logits = model.logits(model.hidden(batch[:, :-1])).transpose(1, 2)
        result[run_dir.name] = F.cross_entropy(logits, batch[:, 1:], reduction="none").mean(1).numpy()
    return result


def leave_evaluation(run_dir, losses, in_log=True, **changes):
    """Write another evaluation.npz, and its loss into the log."""
    fingerprint = torch.load(run_dir / "checkpoint_8", weights_only=True)["data"]["val_data"]
    values = {"step": 8, "sequence_length": 64, "val_data": fingerprint, "val_losses": losses}
    values |= {"hellaswag": "", "hellaswag_right": []}
    np.savez(run_dir / "evaluation.npz", **values | changes)
    if in_log:
        *before, last = (run_dir / "log.jsonl").read_text().split('"val_loss": ')
        last = f"{(values | changes)['val_losses'].mean()}{last[last.index(',') :]}"
        (run_dir / "log.jsonl").write_text('"val_loss": '.join([*before, last]))


@pytest.fixture
def here(runs, tmp_path, monkeypatch):
    """The current folder, with copies of the four runs."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_figure(monkeypatch):
    """Most tests look at numbers alone."""
    monkeypatch.setattr(compare, "draw", lambda *_: None)


def call(capsys, *args):
    return conftest.call(compare.main, capsys, *args, "--device=cpu")


def table(capsys, *args):
    """[{name: value}] of --csv, numbers where they are, and what stderr said."""
    code, out, err = call(capsys, *args, "--csv")
    assert code == 0, err
    rows = list(csv.DictReader(io.StringIO(out)))
    rows = [{k: v if k == "run" else float(v) if v else "-" for k, v in row.items()} for row in rows]
    assert [row["run"] for row in rows] == [str(arg).rsplit("/")[-1] for arg in args if not str(arg).startswith("-")]
    return rows, err


def rewrite(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def edit_log(run_dir, change):
    """Put change(record) in the place of each record of a log; None removes it."""
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    changed = [new for record in records if (new := change(record)) is not None]
    (run_dir / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in changed))


def margin_by_integration(df, spread):
    """95% of Student's t by the textbook density, added up and bisected."""
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        t = np.linspace(0, middle, 20_001)
        inside = 2 * np.trapezoid(constant * (1 + t**2 / df) ** (-(df + 1) / 2), t)
        low, high = (middle, high) if inside < 0.95 else (low, middle)
    return low * spread


# -----------------------------------------------------------------------------
# numbers


def test_the_command_alone(here, run):
    code, out, err = run("compare.py", "softmax-1", "entmax-1")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "these runs differ in their attention alone"
    assert lines[2].split() == ["softmax-1", "entmax-1"]
    shown = {line[:30].strip(): line[30:].split() for line in lines[3:18]}
    final = [f"{read_log(here / name)[-1]['val_loss']:.4f}" for name in ("softmax-1", "entmax-1")]
    assert shown["final validation loss, nats"] == final
    assert shown["difference to the first, nats"][0] == "-" and shown["its 95% interval"] == ["-", "-"]  # HellaSwag's
    assert shown["non-zero attention weights"] == ["100.0%", "-"]
    assert any("not cover the training seed" in line for line in lines[18:])
    assert (here / "comparison.png").stat().st_size > 10_000


def test_interval_is_that_of_the_paired_losses(here, losses, capsys, no_figure):
    rows, err = table(capsys, "softmax-1", "entmax-1", "softmax-2")
    assert rows[0]["difference"] == rows[0]["difference_margin_95"] == "-"
    for row in rows[1:]:
        d = losses[row["run"]] - losses["softmax-1"]
        assert row["difference"] == pytest.approx(d.mean(), abs=1e-6)
        expected = margin_by_integration(WINDOWS - 1, np.std(d, ddof=1) / math.sqrt(WINDOWS))
        assert row["difference_margin_95"] == pytest.approx(expected, rel=1e-3)
    assert "checkpoint" not in err


def test_planted_difference_shows(here, losses, capsys, no_figure):
    planted = losses["softmax-1"] + np.where(np.arange(WINDOWS) % 2, 0.1, 0.3)
    leave_evaluation(here / "entmax-1", planted)
    row = table(capsys, "softmax-1", "entmax-1")[0][1]
    assert row["difference"] == pytest.approx(0.2)
    assert row["difference_margin_95"] == pytest.approx(2.13145 * 0.1 * math.sqrt(16 / 15) / 4, rel=1e-5)


@pytest.mark.parametrize("df, t", [(1, 12.70620), (2, 4.302653), (10, 2.228139), (30, 2.042272), (10_239, 1.960196)])
def test_student_t_of_the_tables(df, t):
    assert compare.t_quantile(df) == pytest.approx(t, rel=1e-6)


def test_student_t_of_no_whole_number():
    for df in (1.3, 2.7, 17.4):
        assert compare.t_quantile(df) == pytest.approx(margin_by_integration(df, 1), rel=1e-5)


def spoil_nothing(path):
    path.unlink()


def spoil_a_byte(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"val_losses.npy") + 200] ^= 1
    path.write_bytes(content)


def spoil_the_end(path):
    path.write_bytes(path.read_bytes()[:300])


def spoil_the_type(path):
    path.write_text("no archive")


@pytest.mark.parametrize("spoil", [spoil_nothing, spoil_a_byte, spoil_the_end, spoil_the_type])
def test_without_a_sound_file_the_checkpoint_gives_the_same(here, losses, capsys, no_figure, spoil):
    expected = table(capsys, "softmax-1", "entmax-1")[0][1]
    spoil(here / "entmax-1" / "evaluation.npz")
    (_, row), err = table(capsys, "softmax-1", "entmax-1")
    assert expected["difference_margin_95"] != "-" and row == expected  # bit for bit on a CPU
    assert "entmax-1/checkpoint_8" in err and f"validating {WINDOWS}/{WINDOWS}" in err
    assert "softmax-1/checkpoint_8" not in err


@pytest.mark.parametrize("changes", [{"step": 4}, {}])
def test_an_older_file_or_one_of_another_run_is_not_taken(here, losses, capsys, no_figure, changes):
    leave_evaluation(here / "entmax-1", losses["entmax-1"] + 1, in_log=False, **changes)
    (_, row), err = table(capsys, "softmax-1", "entmax-1")
    assert row["difference"] == pytest.approx((losses["entmax-1"] - losses["softmax-1"]).mean(), abs=1e-6)
    assert "entmax-1: no sound evaluation.npz of step 8" in err


def test_a_loss_that_is_nan_takes_a_file_of_nan_alone(here, losses, capsys, no_figure):
    edit_log(here / "entmax-1", lambda r: r | {"val_loss": math.nan} if r["step"] == 8 and "val_loss" in r else r)
    assert "no sound evaluation.npz of step 8" in table(capsys, "softmax-1", "entmax-1")[1]
    leave_evaluation(here / "entmax-1", losses["entmax-1"] * math.nan, in_log=False)
    assert "no sound evaluation.npz" not in table(capsys, "softmax-1", "entmax-1")[1]


def test_checkpoint_of_another_step_is_not_taken(here, capsys, no_figure):
    """The table shows the loss after 8 steps, so the weights after 4 would be another comparison."""
    (here / "entmax-1" / "evaluation.npz").unlink()
    (here / "entmax-1" / "checkpoint_8").rename(here / "entmax-1" / "checkpoint_4")
    (first, row), err = table(capsys, "softmax-1", "entmax-1")
    assert "no interval for entmax-1" in err and "after step 8" in err
    assert row["difference_margin_95"] == "-" and row["difference"] == row["val_loss"] - first["val_loss"]


def test_other_shards_are_not_taken(here, shards, capsys, no_figure):
    (here / "entmax-1" / "evaluation.npz").unlink()
    config, old = here / "entmax-1" / "config.toml", f'val_data = "{shards}"'
    for val_data, reason in (("nowhere", "no file matches nowhere"), (f"{shards}/*train*", "does not hold the shards")):
        rewrite(config, old, old := f'val_data = "{val_data}"')
        (_, row), err = table(capsys, "softmax-1", "entmax-1")
        assert row["difference_margin_95"] == "-" and row["difference"] != "-"
        assert f"no interval for entmax-1: val_data{':' if val_data == 'nowhere' else ''}" in err and reason in err


@pytest.mark.parametrize("change", [{"val_data": "other"}, {"sequence_length": 32}, {"val_losses": np.ones(15)}])
def test_other_sequences_are_not_paired(here, losses, capsys, no_figure, change):
    leave_evaluation(here / "entmax-1", losses["entmax-1"], **change)
    (_, row), err = table(capsys, "softmax-1", "entmax-1")
    assert row["difference"] == row["difference_margin_95"] == "-"
    assert "no difference for entmax-1: it validated on other sequences than softmax-1" in err


def test_other_text_has_no_difference(here, capsys, no_figure):
    """Where no losses by sequence are left either."""
    for name in ("evaluation.npz", "checkpoint_8"):
        (here / "entmax-1" / name).unlink()
    config = here / "entmax-1" / "config.toml"
    config.write_text(config.read_text().replace("sequence_length = 64", "sequence_length = 32"))
    (_, row), err = table(capsys, "softmax-1", "entmax-1")
    assert row["difference"] == "-" and "entmax-1: it validated on other sequences" in err


def test_one_sequence_has_no_interval(here, losses, capsys, no_figure):
    for name in ("softmax-1", "entmax-1"):
        leave_evaluation(here / name, losses[name][:1])
    row = table(capsys, "softmax-1", "entmax-1")[0][1]
    assert row["difference"] == losses["entmax-1"][0] - losses["softmax-1"][0] and row["difference_margin_95"] == "-"
    for name, two in (("softmax-1", [4.0, 4.0]), ("entmax-1", [4.1, 4.3])):
        leave_evaluation(here / name, np.array(two))
    row = table(capsys, "softmax-1", "entmax-1")[0][1]
    assert row["difference"] == pytest.approx(0.2) and row["difference_margin_95"] == pytest.approx(12.7062 * 0.1)


def test_nothing_is_computed_where_nothing_can_be_paired(here, capsys, no_figure):
    (here / "softmax-1" / "checkpoint_8").unlink()
    for name in ("softmax-1", "entmax-1"):
        (here / name / "evaluation.npz").unlink()
    (_, row), err = table(capsys, "softmax-1", "entmax-1")
    assert "no interval for softmax-1" in err and "validating" not in err and row["difference_margin_95"] == "-"


def test_hellaswag(here, losses, capsys, no_figure):
    rng = np.random.default_rng(0)
    answers = {"softmax-1": rng.random(400) < 0.3, "entmax-1": rng.random(400) < 0.4}
    answers |= {"softmax-2": rng.random(399) < 0.3}  # but one
    for name, right in answers.items():
        leave_evaluation(here / name, losses[name], hellaswag="examples", hellaswag_right=right)
    (here / "entmax-2" / "evaluation.npz").unlink()
    rows, err = table(capsys, *answers, "entmax-2")
    for row, right in zip(rows, answers.values(), strict=False):
        share, n = np.count_nonzero(right) / len(right), len(right)
        assert row["hellaswag_acc_norm"] == pytest.approx(share)
        assert row["hellaswag_acc_norm_margin_95"] == pytest.approx(1.96 * np.std(right) / math.sqrt(n))
    # twice the tail is the probability of all splits that are not likelier than the one found
    a, b = answers["softmax-1"], answers["entmax-1"]
    found, n = int(np.sum(a > b)), int(np.sum(a != b))
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(n + 1)]
    p = sum(math.exp(x) for x in logs if x <= logs[found] + 1e-9)
    assert 1e-4 < p < 0.1
    assert rows[1]["hellaswag_p"] == pytest.approx(p, rel=1e-6)
    assert rows[2]["hellaswag_p"] == "-" and "no test of HellaSwag for softmax-2" in err
    # from the log alone: no examples, no interval
    assert rows[3]["hellaswag_acc_norm"] == read_log("entmax-2")[-1]["hellaswag_acc_norm"]
    assert rows[0]["hellaswag_p"] == rows[3]["hellaswag_p"] == rows[3]["hellaswag_acc_norm_margin_95"] == "-"


def test_hellaswag_of_training(here, capsys, no_figure):
    rows, err = table(capsys, "softmax-2", "entmax-2", "entmax-1")
    right = []
    for row in rows[:2]:
        right.append(np.load(f"{row['run']}/evaluation.npz")["hellaswag_right"])
        assert len(right[-1]) == 30 and row["hellaswag_acc_norm"] == pytest.approx(right[-1].mean())
        assert row["hellaswag_acc_norm"] == pytest.approx(read_log(row["run"])[-1]["hellaswag_acc_norm"])
    assert rows[1]["hellaswag_p"] == compare.mcnemar(*right)
    assert rows[2]["hellaswag_acc_norm"] == rows[2]["hellaswag_p"] == "-" and "test of HellaSwag" not in err


def test_mcnemar_of_all_and_none():
    right = np.ones(10_042, dtype=bool)
    assert compare.mcnemar(right, right) == 1 and compare.mcnemar(right, ~right) == 0
    six = np.arange(6) < 6
    assert compare.mcnemar(six, ~six) == 2 / 2**6


def test_speed_and_memory_are_those_of_the_log(here, capsys, no_figure):
    def on_a_gpu(record):
        if "train_loss" in record:
            step = record["step"]
            record |= {"step_ms": 10.0 * step, "tokens_per_s": 1000.5 / step, "mfu": step / 100}
            record |= {"peak_memory_bytes": 1_000_000_000 * min(step, 3)}
        return record

    edit_log(here / "entmax-1", on_a_gpu)
    (first, row), _ = table(capsys, "softmax-1", "entmax-1")
    assert row["step_ms"] == 45 and row["mfu"] == pytest.approx(0.045) and row["peak_memory_bytes"] == 3e9
    assert row["tokens_per_s"] == (1000.5 / 4 + 1000.5 / 5) / 2
    assert first["mfu"] == first["peak_memory_bytes"] == "-"
    logged = [r["step_ms"] for r in map(json.loads, open("softmax-1/log.jsonl")) if "step_ms" in r]
    assert first["step_ms"] == statistics.median(logged)
    shown = call(capsys, "softmax-1", "entmax-1")[1].splitlines()
    assert "peak memory, GB -  3.0".split() in [line.split() for line in shown]
    assert "MFU - 4.5%".split() in [line.split() for line in shown]


def test_losses_parameters_and_tokens(here, capsys, no_figure):
    edit_log(here / "entmax-1", lambda r: r | ({"val_loss": 1.5} if "val_loss" in r and r["step"] == 4 else {}))
    (first, row), _ = table(capsys, "softmax-1", "entmax-1")
    assert row["val_loss"] == read_log("entmax-1")[-1]["val_loss"] and row["best_val_loss"] == 1.5
    assert first["best_val_loss"] == first["val_loss"]
    edit_log(here / "softmax-1", lambda r: r | ({"val_loss": math.nan} if "val_loss" in r and r["step"] == 0 else {}))
    assert table(capsys, "softmax-1", "entmax-1")[0][0] == first
    block = 12 * 128**2 + 13 * 128
    assert row["parameters"] == first["parameters"] == (384 + 64) * 128 + 4 * block + 2 * 128
    assert row["tokens"] == 8 * 4 * 64


def test_sparsity(here, capsys, no_figure):
    rows, err = table(capsys, "softmax-1", "entmax-1")
    assert [(r["empty_tiles"], r["nonzero_share"]) for r in rows] == [(0, 1), ("-", "-")]
    assert "evaluate.py --run_dir entmax-1 --sparsity counts its zeros" in err and "--run_dir softmax-1" not in err
    (here / "entmax-1" / "sparsity.json").write_text('{"nonzero_share": 0.125, "empty_tiles": 0.5, "step": 8}')
    rows, err = table(capsys, "softmax-1", "entmax-1")
    assert (rows[1]["empty_tiles"], rows[1]["nonzero_share"]) == (0.5, 0.125) and "sparsity" not in err
    rewrite(here / "entmax-1" / "sparsity.json", '"step": 8', '"step": 4')
    assert "sparsity.json is of step 4, the last validation of step 8" in table(capsys, "softmax-1", "entmax-1")[1]
    (here / "entmax-1" / "sparsity.json").write_text('{"nonzero_share": 0.125')
    rows, err = table(capsys, "softmax-1", "entmax-1")
    assert rows[1]["nonzero_share"] == "-" and "entmax-1/sparsity.json cannot be read" in err
    rewrite(here / "entmax-2" / "config.toml", "alpha = 1.5", "alpha = 1.0")
    assert table(capsys, "softmax-1", "entmax-2")[0][1]["nonzero_share"] == 1


def test_seeds(here, capsys, no_figure):
    rewrite(here / "softmax-2" / "config.toml", "\nalpha = 1.5", "\nalpha = 1.25")  # which softmax does not have
    out = call(capsys, "softmax-1", "entmax-1", "softmax-2", "entmax-2")[1]
    final = {f"{a}-{s}": [r["val_loss"] for r in read_log(f"{a}-{s}") if "val_loss" in r][-1] for a, s in KINDS}
    means, variances = {}, {}
    for attention in ("softmax", "entmax"):
        x, y = final[f"{attention}-1"], final[f"{attention}-2"]
        means[attention], variances[attention] = (x + y) / 2, (x - y) ** 2 / 2
        line = f"Over seeds, {attention}-1 and 1 more: mean {means[attention]:.4f}, standard deviation "
        assert f"{line}{math.sqrt(variances[attention]):.5f}, n = 2" in out
    name = "entmax-1 and 1 more less softmax-1 and 1 more"
    difference = means["entmax"] - means["softmax"]
    by_seed = [final[f"entmax-{s}"] - final[f"softmax-{s}"] for s in (1, 2)]
    margin = 12.7062 * abs(by_seed[0] - by_seed[1]) / 2  # t with one degree of freedom; sqrt(2) / sqrt(2) drop out
    method = "Student's t of the differences seed by seed"
    assert f"{name}: {difference:+.5f} ±{margin:.5f} (95% over seeds, by {method})" in out
    rewrite(here / "entmax-2" / "config.toml", "\nseed = 2", "\nseed = 3")
    a, b = variances["softmax"] / 2, variances["entmax"] / 2
    margin = margin_by_integration((a + b) ** 2 / (a**2 + b**2), math.sqrt(a + b))
    out = call(capsys, "softmax-1", "entmax-1", "softmax-2", "entmax-2")[1]
    assert f"{name}: {difference:+.5f} ±{margin:.5f} (95% over seeds, by Welch's t)" in out


@pytest.mark.parametrize("loss", (math.inf, math.nan))
def test_losses_that_are_not_finite_give_no_warning(loss):
    with warnings.catch_warnings(action="error"):
        mean, margin = compare.paired(np.array([1.0, loss, 3.0]), np.array([1.0, math.inf, 2.0]))
    assert not math.isfinite(mean) and math.isnan(margin)


def test_seeds_on_other_text_have_no_difference(here, capsys, no_figure):
    for name in ("entmax-1", "entmax-2"):
        for file in ("evaluation.npz", "checkpoint_8"):
            (here / name / file).unlink()
        rewrite(here / name / "config.toml", "sequence_length = 64", "sequence_length = 32")
    out = call(capsys, "softmax-1", "entmax-1", "softmax-2", "entmax-2")[1]
    line = "entmax-1 and 1 more less softmax-1 and 1 more: no difference, as they validated on other sequences"
    assert line in out and "95% over seeds" not in out


def test_welch_of_unequal_samples():
    a, b = [3.0, 3.2, 3.1], [2.9, 2.0]
    mean, margin = compare.welch(a, b)
    of_a, of_b = 0.01 / 3, 0.405 / 2
    df = (of_a + of_b) ** 2 / (of_a**2 / 2 + of_b**2)
    assert mean == pytest.approx(2.45 - 3.1) and 1 < df < 1.1
    assert margin == pytest.approx(margin_by_integration(df, math.sqrt(of_a + of_b)), rel=1e-5)
    assert compare.welch([1.0, 1.0], [2.0, 2.0]) == (1.0, 0.0)


def test_one_seed_twice_is_one_sample(here, capsys, no_figure):
    shutil.copytree("softmax-1", "again")
    assert "Over seeds" not in call(capsys, "softmax-1", "entmax-1", "again")[1]
    out = call(capsys, "softmax-1", "softmax-1")[1]
    assert out.startswith("these runs do not differ in their configuration\n") and "Over seeds" not in out
    assert "+0.00000" in out and "±0.00000" in out


# -----------------------------------------------------------------------------
# in what the runs differ


@pytest.mark.parametrize(
    "change, line",
    [
        ({}, "these runs differ in their attention alone"),
        ({"\nalpha = 1.5": "\nalpha = 1.25"}, "these runs differ in their attention alone"),
        ({"micro_batch_size = 4": "micro_batch_size = 2"}, "these runs differ in their attention alone"),
        ({'train_data = "': 'train_data = "./'}, "these runs differ in their attention alone"),  # the same shards
        ({"seed = 1": "seed = 5"}, "NOTE: these runs differ in more than the attention: seed (1, 5)"),
        (
            {"weight_decay = 0.1": "weight_decay = 0.2", 'init_from = ""': 'init_from = "gpt2"'},
            "NOTE: these runs differ in more than the attention: weight_decay (0.1, 0.2), init_from (-, gpt2)",
        ),
        (
            {'entmax"': 'softmax"', "grad_clip = 1.0": "grad_clip = 0.0"},
            "NOTE: these runs differ in something else than the attention: grad_clip (1.0, 0.0)",
        ),
        ({'entmax"': 'softmax"'}, "these runs do not differ in their configuration"),
    ],
)
def test_first_line(here, capsys, no_figure, change, line):
    for old, new in change.items():
        rewrite(here / "entmax-1" / "config.toml", old, new)
    assert call(capsys, "softmax-1", "entmax-1")[1].splitlines()[0] == line


def test_first_line_on_a_schedule_that_moved(here, flags, capsys, no_figure):
    """Steps 4 to 8 of a run that was to end at 8: those before are its warm-up and the peak."""
    longer = [*flags, "--seed=1", "--max_steps=10", "--checkpoint_every=0"]
    train([*longer, "--attention=entmax", "--run_dir=entmax-1", "--resume=auto"])
    train([*longer, "--attention=softmax", "--run_dir=straight"])
    line = call(capsys, "straight", "entmax-1")[1].splitlines()[0]
    assert line == "NOTE: these runs differ in more than the attention: steps at another learning rate (0, 5)"


def test_first_line_on_data_and_tokens(here, shards, capsys, no_figure):
    fingerprint = torch.load("softmax-1/checkpoint_8", weights_only=True)["data"]["val_data"]
    of_start = {"val_data": "other"}
    edit_log(here / "entmax-1", lambda r: r | of_start if r.get("event") == "start" else r)
    edit_log(here / "entmax-1", lambda r: r if r["step"] < 8 or "val_loss" in r else None)
    code, out, err = call(capsys, "softmax-1", "entmax-1", "--csv")
    found = f"val_data ({shards} {fingerprint}, {shards} other), tokens trained (2048, 1792)"
    assert err.splitlines()[0] == f"NOTE: these runs differ in more than the attention: {found}"
    assert out.startswith("run,parameters,") and "NOTE" not in out
    # where a run has no fingerprint, the spelling counts
    edit_log(here / "entmax-1", lambda r: {k: v for k, v in r.items() if not k.endswith("_data")})
    assert "_data" not in call(capsys, "softmax-1", "entmax-1")[1].splitlines()[0]
    rewrite(here / "entmax-1" / "config.toml", 'train_data = "', 'train_data = "./')
    assert f"train_data ({shards}, ./{shards})" in call(capsys, "softmax-1", "entmax-1")[1].splitlines()[0]


def test_what_does_not_fit_costs_the_interval_alone(here, capsys, no_figure):
    """A checkpoint without what it validated on, one of shorter sequences; and a log that lacks a learning rate."""
    (here / "entmax-1" / "evaluation.npz").unlink()
    path = here / "entmax-1" / "checkpoint_8"
    state = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "data"}, path)
    assert "no interval for entmax-1: entmax-1/checkpoint_8: " in call(capsys, "softmax-1", "entmax-1")[2]
    torch.save(state, path)
    rewrite(here / "entmax-1" / "config.toml", "sequence_length = 64", "sequence_length = 128")
    config = json.loads(json.dumps(state["config"])) | {"sequence_length": 128}
    torch.save(state | {"config": config}, path)
    edit_log(here / "entmax-1", lambda r: r | ({"lr": None} if r["step"] == 8 else {}))
    code, _, err = call(capsys, "softmax-1", "entmax-1")
    assert code == 0 and "sequence_length 128 is longer than the model's 64 positions" in err, err


def test_names_that_are_not_utf_8(here, run):
    name = os.fsdecode(b"bad\xff")
    shutil.move(here / "entmax-1", here / name)
    code, out, err = run("compare.py", "softmax-1", name)
    assert code == 0 and "bad\ufffd" in out and "Traceback" not in err and (here / "comparison.png").exists()


def test_other_set_ups_are_named(here, capsys, no_figure):
    assert "set-ups" not in call(capsys, "softmax-1", "entmax-1")[1]
    edit_log(here / "entmax-1", lambda r: r | ({"device": "H200"} if r.get("event") == "start" else {}))
    rewrite(here / "entmax-1" / "config.toml", "compile = false", "compile = true")
    out = call(capsys, "softmax-1", "entmax-1")[1]
    assert out.splitlines()[0] == "these runs differ in their attention alone"
    assert "different set-ups, on which speed and memory depend: device (cpu, H200), compile (False, True)" in out


# -----------------------------------------------------------------------------
# forms


def test_markdown(here, capsys, no_figure):
    (here / "softmax-1").rename("a|b")
    code, out, _ = call(capsys, "a|b", "entmax-1", "softmax-2", "--markdown")
    lines = out.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert code == 0 and lines[1] == "" and lines[2] == rows[0] == "| | a\\|b | entmax-1 | softmax-2 |"
    assert rows[1] == "| --- | ---: | ---: | ---: |" and lines[2 + len(rows)] == ""
    assert len(rows) == 2 + len(compare.ROWS)
    assert all(row.replace("\\|", "").count("|") == 5 and row.endswith(" |") for row in rows)


def test_csv_is_exact_and_alone(here, capsys, no_figure):
    code, out, err = call(capsys, "softmax-1", "entmax-1", "--csv")
    assert out.count("\n") == 3 and "Intervals" in err
    row = list(csv.DictReader(io.StringIO(out)))[1]
    assert float(row["val_loss"]) == read_log("entmax-1")[-1]["val_loss"]


def test_eight_runs_fit_into_a_terminal(here, capsys, no_figure):
    names = [f"gpt2-entmax-20261124-20142{i}" for i in range(8)]
    for name in names:
        shutil.copytree("entmax-1", name)
    lines = call(capsys, *names)[1].splitlines()
    assert max(map(len, lines)) <= 120
    heads = [line.split() for line in lines[2:7]]
    assert ["".join(parts) for parts in zip(*heads[:-1], strict=True)] == names and heads[-1][0] == "parameters"
    shutil.copytree("entmax-1", "ninth")
    lines = call(capsys, *names, "ninth")[1].splitlines()
    assert max(map(len, lines[:40])) <= 120 and [line.split() for line in lines].count(["ninth"]) == 1
    assert sum(line.startswith("parameters") for line in lines) == 2
    # folders of the same name are told apart by what was given
    shutil.copytree("softmax-1", "other/entmax-1")
    assert call(capsys, "entmax-1", "other/entmax-1")[1].splitlines()[2].split() == ["entmax-1", "other/entmax-1"]


def drawn(path):
    """The size of a PNG, and which of the colours of compare.py it shows, by their index."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    pixels = np.round(imread(path)[..., :3] * 255).astype(int)
    colours = [np.round(255 * np.array(to_rgb(colour))).astype(int) for colour in compare.COLOURS[:6]]
    return pixels.shape[1::-1], [i for i, colour in enumerate(colours) if (pixels == colour).all(-1).sum() > 100]


def test_figure(here, capsys):
    code, _, err = call(capsys, "softmax-1", "entmax-1", "entmax-2", "--out", "three.png")
    assert code == 0 and "drew three.png" in err
    (width, height), colours = drawn(here / "three.png")
    assert 1500 <= width <= 3000 and 500 <= height <= 1500 and colours == [0, 1, 2]


def test_curves_are_those_of_the_logs(here, losses, capsys, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    leave_evaluation(here / "entmax-1", losses["softmax-1"] + np.where(np.arange(WINDOWS) % 2, 0.1, 0.3))
    edit_log(here / "entmax-1", lambda r: None if "val_loss" in r and r["step"] == 4 else r)
    assert call(capsys, "softmax-1", "entmax-1")[0] == 0
    by_tokens, by_hours, by_difference = figures[0].axes
    final = {}
    for i, name in enumerate(("softmax-1", "entmax-1")):
        ms, hours, tokens, values = 0, [], [], []
        for record in map(json.loads, open(f"{name}/log.jsonl")):
            ms += record.get("step_ms", 0) + record.get("val_ms", 0)
            if "val_loss" in record:
                hours.append(ms / 1000 / 60 / 60)
                tokens.append(record["step"] * 4 * 64)
                values.append(record["val_loss"])
        np.testing.assert_allclose(by_tokens.lines[i].get_data(), (tokens, values))
        np.testing.assert_allclose(by_hours.lines[i].get_data(), (hours, values))
        final[name] = values
    expected = np.array(final["entmax-1"]) - np.array(final["softmax-1"])[[0, 2]]
    np.testing.assert_allclose(by_difference.lines[1].get_data(), ([0, 2048], expected))
    ((_, low), (_, high)) = by_difference.collections[0].get_segments()[0]
    assert (low + high) / 2 == pytest.approx(0.2) and high - low == pytest.approx(2 * 2.13145 * 0.1 / math.sqrt(15))
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["softmax-1", "entmax-1"]
    # the initial loss is beyond the edge, unless a run has nothing else
    assert max(final["softmax-1"][1:]) < by_tokens.get_ylim()[1] < final["softmax-1"][0]
    edit_log(here / "entmax-1", lambda r: None if "val_loss" in r and r["step"] else r)
    assert call(capsys, "softmax-1", "entmax-1")[0] == 0
    assert figures[1].axes[0].get_ylim()[1] > final["entmax-1"][0]


def test_curve_over_seeds(here, capsys, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    edit_log(here / "entmax-2", lambda r: None if "val_loss" in r and r["step"] == 4 else r)
    assert call(capsys, "softmax-1", "entmax-2", "softmax-2", "entmax-1")[0] == 0
    losses = {f"{a}-{s}": {r["step"]: r["val_loss"] for r in read_log(f"{a}-{s}") if "val_loss" in r} for a, s in KINDS}
    steps = np.array([0, 8])
    by_seed = np.array([[losses[f"entmax-{s}"][t] - losses[f"softmax-{s}"][t] for t in steps] for s in (1, 2)])
    by_tokens, _, axes = figures[0].axes
    assert [len(line.get_xdata()) for line in by_tokens.lines] == [3, 3, 2, 3]
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["softmax-1 and 1 more", "entmax-2 and 1 more"]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), 0)
    np.testing.assert_allclose(axes.lines[1].get_data(), (steps * 4 * 64, by_seed.mean(0)))
    margin = 12.7062 * np.abs(by_seed[0] - by_seed[1]) / 2
    band = axes.collections[1].get_paths()[0].vertices
    for t, low, high in zip(steps * 4 * 64, by_seed.mean(0) - margin, by_seed.mean(0) + margin, strict=True):
        of_t = band[band[:, 0] == t, 1]
        assert (of_t.min(), of_t.max()) == pytest.approx((low, high), rel=1e-5)
    # a run that was only started, and one of another seed, take nothing from it
    shutil.copytree("entmax-1", "started")
    edit_log(here / "started", lambda r: None if "val_loss" in r else r)
    shutil.copytree("entmax-1", "other")
    rewrite(here / "other" / "config.toml", "\nseed = 1", "\nseed = 3")
    rewrite(here / "other" / "config.toml", "\nalpha = 1.5", "\nalpha = 1.25")
    assert call(capsys, "softmax-1", "entmax-2", "softmax-2", "entmax-1", "started", "other")[0] == 0
    axes = figures[1].axes[2]
    np.testing.assert_allclose(axes.lines[1].get_data(), (steps * 4 * 64, by_seed.mean(0)))
    labels = [text.get_text() for text in figures[1].legends[0].get_texts()]
    assert labels == ["softmax-1 and 1 more", "entmax-2 and 1 more", "other", "started (no validation)"]
    # where seeds differ each run is held against the first
    assert call(capsys, "softmax-1", "softmax-2", "entmax-1")[0] == 0
    assert [text.get_text() for text in figures[2].legends[0].get_texts()] == ["softmax-1", "softmax-2", "entmax-1"]
    assert figures[2].axes[2].get_ylabel() == "validation loss less that of the first run (nats a token)"


def test_figure_shows_what_there_is(here, capsys):
    """No validation, one of the initial weights alone, steps skipped, a line being written, a name of formulas."""
    edit_log(here / "softmax-1", lambda r: None if "val_loss" in r else r)
    edit_log(here / "softmax-2", lambda r: None if "val_loss" in r and r["step"] else r)
    edit_log(here / "entmax-1", lambda r: r | ({"train_loss": None, "skipped": True} if r.get("train_loss") else {}))
    (here / "entmax-2").rename("_$x_{$")
    with open("_$x_{$/log.jsonl", "a") as file:
        file.write('{"step": 9, "val_lo')
    names = ["softmax-1", "softmax-2", "entmax-1", "_$x_{$"]
    code, out, err = call(capsys, *names)
    assert code == 0 and "Traceback" not in err, err
    shown = {line[:30].strip(): line[30:].split() for line in out.splitlines()[3:18]}
    assert shown["final validation loss, nats"][0] == "-" and shown["tokens trained"] == ["2.048k"] * 4
    assert shown["difference to the first, nats"] == ["-"] * 4
    assert shown["step, ms"][2] != "-"
    assert drawn(here / "comparison.png")[1] == [0, 1, 2, 3]  # the first in the legend alone
    code, out, err = call(capsys, *names[::-1])
    assert code == 0 and "no checkpoint of its last validation, after step 0" in err
    shown = {line[:30].strip(): line[30:].split() for line in out.splitlines()[3:18]}
    assert [value == "-" for value in shown["difference to the first, nats"]] == [True, False, False, True]


# -----------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize(
    "command, words",
    [
        ("softmax-1", "softmax-1: one run has nothing to be compared with: give two or more"),
        ("", "the following arguments are required: RUN (--help lists the flags)"),
        ("softmax-1 nowhere", "nowhere: no such folder; give the folders of two or more runs"),
        ("softmax-1 softmax-1/log.jsonl", "softmax-1/log.jsonl: no such folder; give the folders of two or more runs"),
        (". softmax-1", ".: holds no run (no config.toml there)"),
        ("softmax-1 entmax-1 --out figure.pdf", "--out figure.pdf: the figure is a PNG, its name should end in .png"),
        ("softmax-1 entmax-1 --cvs", "unknown argument '--cvs': did you mean '--csv'?"),
        ("softmax-1 entmax-1 --csv --markdown", "argument --markdown: not allowed with argument --csv"),
        ("softmax-1 entmax-1 --device gpu", "device should be one of auto, cpu, cuda, mps, not 'gpu'"),
    ],
)
def test_mistakes_get_one_line(here, capsys, command, words):
    try:
        cli.run(lambda: compare.main(command.split()))
    except SystemExit as stop:
        assert stop.code == 2
    else:
        pytest.fail("no mistake")
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {words}") and err.count("\n") == 1


def test_out_that_cannot_be_written_costs_the_figure_alone(here, capsys):
    for out in ("nowhere/x.png", "folder.png"):
        (here / "folder.png").mkdir(exist_ok=True)
        code, text, err = call(capsys, "softmax-1", "entmax-1", "--out", out)
        assert code == 2 and "final validation loss" in text
        assert err.splitlines()[-1].startswith(f"error: --out {out}: cannot be written (")


def test_damaged_log_and_configuration_are_named(here, capsys):
    lines = (here / "entmax-1" / "log.jsonl").read_text().splitlines(keepends=True)
    (here / "entmax-1" / "log.jsonl").write_text("".join([*lines[:4], lines[4][:20] + "\n", *lines[5:]]))
    code, out, err = call(capsys, "softmax-1", "entmax-1")
    assert (code, out) == (2, "") and err.startswith("error: entmax-1/log.jsonl: line 5 is damaged")
    (here / "entmax-1" / "log.jsonl").unlink()
    code, out, err = call(capsys, "softmax-1", "entmax-1")
    assert (code, out, err) == (2, "", "error: entmax-1: holds no run (no log.jsonl there)\n")
    rewrite(here / "entmax-2" / "config.toml", "seed = 2", "seed = two")
    code, out, err = call(capsys, "softmax-1", "entmax-2")
    assert (code, out) == (2, "") and "entmax-2/config.toml: not valid TOML" in err
