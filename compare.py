"""Runs side by side: loss, HellaSwag, speed, memory and sparsity, as a table and as a figure.

    python compare.py runs/softmax runs/entmax
    python compare.py runs/softmax runs/entmax --markdown --out entmax.png > entmax.md
    python compare.py runs/softmax-1 runs/softmax-2 runs/entmax-1 runs/entmax-2 --csv > runs.csv

The first line says whether the runs differ in their attention alone. Every difference is to the first run: the mean
over the same validation sequences of one loss less the other. These come from the evaluation.npz that training leaves
in a run's folder or, without it, from the checkpoint of the last validation, which takes as long as that did.
"""

import csv
import json
import math
import os
import shlex
import statistics
import sys
import textwrap
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import checkpoint
import cli
from cli import Parser, UserError, notice
from data.shards import TokenStream, find_shards
from data.tokenizer import VOCAB_SIZE
from train_gpt2 import (
    MAY_DIFFER,
    Config,
    add_fields,
    check_fits,
    learning_rate,
    parse_value,
    read_log,
    read_toml,
    start_machine,
    validate,
    validation_windows,
)

TERMINAL = 120  # columns

# -----------------------------------------------------------------------------
# what a run left in its folder


class Validation(NamedTuple):
    step: int
    tokens: int  # trained on until then
    hours: float  # of training steps and validations until then
    loss: float  # nats a token


class Evaluation(NamedTuple):
    """What is behind the last validation."""

    val_data: str  # fingerprint of the stream
    sequence_length: int
    losses: np.ndarray  # (windows,) float64: the mean loss of each, nats a token
    hellaswag: str = ""  # fingerprint of the examples; empty: not answered
    right: np.ndarray = np.zeros(0, dtype=bool)  # (examples,), by acc_norm


@dataclass
class Run:
    path: Path
    name: str
    config: Config
    records: list[dict]  # of log.jsonl
    validations: list[Validation]
    start: dict  # the newest record of a start: machine, versions, parameters, fingerprints of the data
    evaluation: Evaluation | None

    def training(self, key):
        """That value of every training record that has it."""
        return [r[key] for r in self.records if "train_loss" in r and r.get(key) is not None]

    def last(self, field):
        """That field of the last validation, None where there was none."""
        return getattr(self.validations[-1], field) if self.validations else None


def read_run(path, name):
    """The Run in a folder. Raises UserError if there is none, or one whose log or configuration is damaged."""
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such folder; give the folders of two or more runs")
    for needed in ("config.toml", "log.jsonl"):
        if not os.path.isfile(path / needed):
            raise UserError(f"{path}: holds no run (no {needed} there)")
    log = path / "log.jsonl"
    try:
        records, damaged = read_log(log)
    except OSError as error:
        raise UserError(f"{log}: cannot be read ({error.strerror})") from error
    if damaged:
        raise UserError(f"{log}: line {damaged} is damaged: mend it, or delete it and those after it")
    config = Config(**read_toml(path / "config.toml"))

    validations, hours = [], 0.0
    for record in records:
        hours += (record.get("step_ms", 0) + record.get("val_ms", 0)) / 3.6e6
        if "val_loss" in record:
            tokens = record["step"] * config.batch_size * config.sequence_length
            loss = math.nan if record["val_loss"] is None else record["val_loss"]
            validations.append(Validation(record["step"], tokens, hours, loss))
    start = next((r for r in reversed(records) if r.get("event") in ("start", "resume")), {})
    evaluation = read_evaluation(path, validations[-1]) if validations else None
    return Run(path, name, config, records, validations, start, evaluation)


def read_evaluation(path, validation):
    """The Evaluation in a run's evaluation.npz; None if that is missing, damaged or not of this validation."""
    try:
        with np.load(path / "evaluation.npz", allow_pickle=False) as file:
            of_this = np.isclose(file["val_losses"].mean(), validation.loss, rtol=0, atol=1e-6, equal_nan=True)
            if int(file["step"]) != validation.step or not of_this:
                return None
            of_text = str(file["val_data"]), int(file["sequence_length"]), file["val_losses"]
            return Evaluation(*of_text, str(file["hellaswag"]), file["hellaswag_right"])
    except Exception:  # there is one for each kind of damage
        return None


def compute_evaluation(run, machine):
    """The Evaluation of the last validation, without HellaSwag, from that step's checkpoint. Raises UserError."""
    config, step = run.config, run.last("step")
    file = checkpoint.checkpoints(run.path).get(step)  # any other has not the loss that the table shows
    if file is None:
        raise UserError(f"no sound evaluation.npz and no checkpoint of its last validation, after step {step}")
    notice(f"{run.path}: no sound evaluation.npz of step {step}: computing the losses of {file}")
    state = checkpoint.load(file)
    shards = find_shards(config.val_data, "val", "val_data")
    stream = TokenStream(shards, config.sequence_length, VOCAB_SIZE[config.tokenizer], config.shard_format)
    with checkpoint.reading(file):
        validated_on = state["data"]["val_data"]
    if stream.fingerprint() != validated_on:
        raise UserError(f"val_data {config.val_data} does not hold the shards that the run validated on")
    model = checkpoint.load_model(state).to(machine.device)
    check_fits(model, config.tokenizer, config.sequence_length)
    windows = validation_windows(stream, config.val_tokens, quiet=True)
    _, losses = validate(model, stream, windows, config.micro_batch_size, machine, quiet=False)
    return Evaluation(stream.fingerprint(), config.sequence_length, losses.cpu().numpy())


def sparsity_of(run):
    """(share of empty 64x64 tiles, share of non-zero attention weights) of a run, None each where nobody measured."""
    if run.config.attention == "softmax" or run.config.alpha == 1:
        return 0.0, 1.0  # by definition
    path = run.path / "sparsity.json"
    measure = f"python evaluate.py --run_dir {shlex.quote(str(run.path))} --sparsity"
    try:
        measured = json.loads(path.read_text())
        shares = float(measured["empty_tiles"]), float(measured["nonzero_share"])
        if measured["step"] != run.last("step"):
            notice(f"{path} is of step {measured['step']}, the last validation of step {run.last('step')}")
        return shares
    except FileNotFoundError:
        notice(f"{run.path}: no sparsity.json: {measure} counts its zeros")
        return None, None
    except (OSError, ValueError, KeyError, TypeError) as error:
        notice(f"{path} cannot be read ({error!r}): {measure} writes it again")
        return None, None


# -----------------------------------------------------------------------------
# in what the runs differ


def settings(runs):
    """For each run a dictionary of what decides its losses; the data by their fingerprints where all are known."""
    result = []
    for run in runs:
        # init_from, of no effect on a resumed run, is one on two runs
        values = {k: v for k, v in asdict(run.config).items() if k not in MAY_DIFFER - {"init_from"}}
        for name in ("train_data", "val_data"):
            fingerprints = [other.start.get(name) for other in runs]
            if None not in fingerprints:
                alike = len(set(fingerprints)) == 1
                values[name] = run.start[name] if alike else f"{values[name]} {run.start[name]}"
        values |= {"tokens trained": max(run.training("tokens"), default=0)}
        values |= {"steps at another learning rate": steps_off_schedule(run)}
        values |= {"tokens at the last validation": run.last("tokens")}
        if run.config.attention == "softmax":
            values |= {name: None for name in values if is_of_attention(name) and name != "attention"}
        result.append(values)
    return result


def steps_off_schedule(run):
    """How many steps had another learning rate than the configuration says, as those before max_steps was raised."""
    done = (r for r in run.records if r.get("lr") is not None and r["step"] <= run.config.max_steps)
    return sum(not math.isclose(r["lr"], learning_rate(run.config, r["step"]), rel_tol=1e-6) for r in done)


def is_of_attention(name):
    return name in ("attention", "alpha") or name.startswith("alpha_")


def differences(dictionaries):
    """{key: its values} for the keys whose values are not the same in all of the dictionaries."""
    values = {key: list(dict.fromkeys(d[key] for d in dictionaries)) for key in dictionaries[0]}
    return {key: v for key, v in values.items() if len(v) > 1}


def listing(found):
    """The differences() as text: seed (1337, 1338), max_steps (100, 200)."""
    shown = {key: ["-" if value in (None, "") else str(value) for value in values] for key, values in found.items()}
    return ", ".join(f"{key} ({', '.join(values)})" for key, values in shown.items())


def first_line(runs):
    found = differences(settings(runs))
    others = {name: values for name, values in found.items() if not is_of_attention(name)}
    if others:
        more = "more than" if len(others) < len(found) else "something else than"
        return f"NOTE: these runs differ in {more} the attention: {listing(others)}"
    return f"these runs {'differ in their attention alone' if found else 'do not differ in their configuration'}"


def set_ups(runs):
    """For each run what decides its speed, and the last bits of its losses."""
    result = []
    for run in runs:
        values = {name: run.start.get(name) for name in ("device", "world_size", "torch", "code")}
        result.append(values | {k: getattr(run.config, k) for k in ("compile", "deterministic", "micro_batch_size")})
    return result


# -----------------------------------------------------------------------------
# statistics


def t_quantile(df):
    """What the absolute value of Student's t exceeds with probability 0.05, for any real df from 1."""
    # with t = sqrt(df) tan(angle) the density is cos(angle)^(df - 1): summed up on a grid, right to 5 digits
    angle = np.linspace(0, np.pi / 2, 200_001)
    mass = np.append(0, np.cumsum(np.cos((angle[1:] + angle[:-1]) / 2) ** (df - 1)))
    return math.sqrt(df) * math.tan(np.interp(0.95, mass / mass[-1], angle))


def paired(a, b):
    """The mean of b - a, (n,) each, and its 95% margin, None for n = 1."""
    # neighbouring sequences share documents, so the true margin is wider: by a fifth or more for 128 bytes of Python
    with np.errstate(invalid="ignore"):  # infinite losses may leave NaN
        d, n = b - a, len(a)
        return float(d.mean()), float(t_quantile(n - 1) * d.std(ddof=1) / math.sqrt(n)) if n > 1 else None


def welch(a, b):
    """The mean of b less that of a, lists of two numbers or more, and its 95% margin; the variances may be unequal."""
    of_a, of_b = (statistics.variance(x) / len(x) for x in (a, b))  # of the means
    df = (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1)) if of_a + of_b else 1
    return statistics.fmean(b) - statistics.fmean(a), t_quantile(df) * math.sqrt(of_a + of_b)


def mcnemar(a, b):
    """The two-sided p of McNemar's exact test on the right answers (n,) bool of two runs to the same questions."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n, ways, tail = only_a + only_b, 1, 0
    for k in range(min(only_a, only_b) + 1):
        tail += ways  # of n coins, to show k heads
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def kinds_of(runs):
    """A list of {seed: run}, each of runs with validations that are alike but for the seed."""
    kinds = {}
    for run, values in zip(runs, settings(runs), strict=True):
        if run.validations:
            kind = tuple(value for name, value in values.items() if name != "seed")
            kinds.setdefault(kind, {}).setdefault(run.config.seed, run)  # a seed twice is one sample
    return list(kinds.values())


def name_of(kind):
    first, *others = kind.values()
    return f"{first.name} and {len(others)} more" if others else first.name


def of_one_text(a, b):
    """Whether two kinds validated on the same sequences."""
    return text(next(iter(a.values()))) == text(next(iter(b.values())))


def over_seeds(runs):
    """Lines on the final losses of the kinds_of() runs, where there are two seeds or more."""
    kinds = [kind for kind in kinds_of(runs) if len(kind) > 1]
    lines = []
    for kind in kinds:
        losses = [run.last("loss") for run in kind.values()]
        spread = f"standard deviation {math.sqrt(statistics.variance(losses)):.5f}, n = {len(losses)}"
        lines.append(f"Over seeds, {name_of(kind)}: mean {statistics.fmean(losses):.4f}, {spread}")
    for kind in kinds[1:]:
        first = kinds[0]
        if not of_one_text(first, kind):
            difference = "no difference, as they validated on other sequences"
        elif kind.keys() == first.keys():  # of one seed are the random draws of the weights and the order of the data
            mean, margin = paired(*(np.array([x[seed].last("loss") for seed in first]) for x in (first, kind)))
            difference = f"{mean:+.5f} ±{margin:.5f} (95% over seeds, by Student's t of the differences seed by seed)"
        else:
            mean, margin = welch(*([run.last("loss") for run in x.values()] for x in (first, kind)))
            difference = f"{mean:+.5f} ±{margin:.5f} (95% over seeds, by Welch's t)"
        lines.append(f"Over seeds, {name_of(kind)} less {name_of(first)}: {difference}")
    return lines


# -----------------------------------------------------------------------------
# the table


def short(n):
    """124.5M for 124,475,904."""
    unit, letter = next((u for u in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if abs(n) >= u[0]), (1, ""))
    return f"{n / unit:.4g}{letter}"


ROWS = {  # name in the CSV: title in the table, how to show a value
    "parameters": ("parameters", short),
    "tokens": ("tokens trained", short),
    "val_loss": ("final validation loss, nats", "{:.4f}".format),
    "best_val_loss": ("best validation loss, nats", "{:.4f}".format),
    "difference": ("difference to the first, nats", "{:+.5f}".format),
    "difference_margin_95": ("  its 95% interval", "±{:.5f}".format),
    "hellaswag_acc_norm": ("HellaSwag acc_norm", "{:.4f}".format),
    "hellaswag_acc_norm_margin_95": ("  its 95% interval", "±{:.4f}".format),
    "hellaswag_p": ("  McNemar p against the first", "{:.2g}".format),
    "tokens_per_s": ("tokens/s", "{:,.0f}".format),
    "step_ms": ("step, ms", "{:,.1f}".format),
    "mfu": ("MFU", "{:.1%}".format),
    "peak_memory_bytes": ("peak memory, GB", lambda n: f"{n / 1e9:.1f}"),
    "empty_tiles": ("empty 64x64 tiles", "{:.1%}".format),
    "nonzero_share": ("non-zero attention weights", "{:.1%}".format),
}
COVERAGE = """\
Intervals are of 95% and cover the choice of the text: validation sequences (Student's t of the paired losses, taken as
independent) and HellaSwag's examples (normal; p by McNemar's exact test). They do not cover the training seed."""


def row(run, first):
    """The values of ROWS for a run; None where there is none."""
    values = dict.fromkeys(ROWS)
    values |= {"parameters": run.start.get("parameters"), "tokens": max(run.training("tokens"), default=0)}
    values["val_loss"] = run.last("loss")
    values["best_val_loss"] = min((v.loss for v in run.validations if math.isfinite(v.loss)), default=None)
    accuracies = [r["hellaswag_acc_norm"] for r in run.records if "hellaswag_acc_norm" in r]
    values["hellaswag_acc_norm"] = accuracies[-1] if accuracies else None
    if run.evaluation and run.evaluation.hellaswag:
        p, n = float(run.evaluation.right.mean()), len(run.evaluation.right)
        values |= {"hellaswag_acc_norm": p, "hellaswag_acc_norm_margin_95": 1.96 * math.sqrt(p * (1 - p) / n)}
    for key in ("tokens_per_s", "step_ms", "mfu"):
        values[key] = statistics.median(run.training(key) or [None])
    values["peak_memory_bytes"] = max(run.training("peak_memory_bytes"), default=None)
    values["empty_tiles"], values["nonzero_share"] = sparsity_of(run)
    return values | (against(run, first) if run is not first else {})


def text(run):
    """What a run validated on: (fingerprint of the shards, tokens a sequence, sequences)."""
    if run.evaluation:
        return run.evaluation.val_data, run.evaluation.sequence_length, len(run.evaluation.losses)
    T, tokens = run.config.sequence_length, [r["val_tokens"] for r in run.records if "val_tokens" in r]
    return run.start.get("val_data"), T, tokens[-1] // T if tokens else 0


def against(run, first):
    """The values of ROWS that compare a run with the first; a line on stderr where their texts are not the same."""
    values, a, b = {}, first.evaluation, run.evaluation
    same_text = text(run) == text(first)
    if run.validations and first.validations and not same_text:
        notice(f"no difference for {run.path}: it validated on other sequences than {first.path}")
    elif run.validations and first.validations:
        values["difference"] = run.last("loss") - first.last("loss")
    if a and b:
        if same_text:
            values["difference"], values["difference_margin_95"] = paired(a.losses, b.losses)
        if a.hellaswag and (a.hellaswag, len(a.right)) == (b.hellaswag, len(b.right)):
            values["hellaswag_p"] = mcnemar(a.right, b.right)
        elif a.hellaswag and b.hellaswag:
            notice(f"no test of HellaSwag for {run.path}: it answered other examples than {first.path}")
    return values


def print_csv(names, rows):
    """A row a run, in full precision."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["run", *ROWS])
    for name, values in zip(names, rows, strict=True):
        table.writerow([name, *values.values()])  # None becomes an empty cell


def print_table(names, rows, markdown):
    """A column a run. For a terminal, eight runs side by side, and names that are too wide for it are broken."""
    titles = [title for title, _ in ROWS.values()]
    columns = [["-" if v[key] is None else show(v[key]) for key, (_, show) in ROWS.items()] for v in rows]
    if markdown:
        print("| |", " | ".join(name.replace("|", "\\|") for name in names), "|")
        print("| --- |", " | ".join("---:" for _ in names), "|")
        for title, *cells in zip(titles, *columns, strict=True):
            print(f"| {title.strip()} |", " | ".join(cells), "|")
        return
    if len(names) > 8:
        print_table(names[:8], rows[:8], markdown)
        print()
        print_table(names[8:], rows[8:], markdown)
        return
    left = max(map(len, titles))
    room = (TERMINAL - left) // len(names) - 2
    widths = [max(min(len(name), room), *map(len, column)) for name, column in zip(names, columns, strict=True)]
    heads = [textwrap.wrap(name, width) for name, width in zip(names, widths, strict=True)]
    height = max(map(len, heads))
    columns = [[""] * (height - len(head)) + head + column for head, column in zip(heads, columns, strict=True)]
    for title, *cells in zip([""] * height + titles, *columns, strict=True):
        print(f"{title:{left}}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)), sep="  ")


# -----------------------------------------------------------------------------
# the figure

# Okabe and Ito's colours for all eyes, without the yellow, which is faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def draw_difference(axes, first, run, values, style):
    """Against tokens, what run loses more than first, and the margin of the last difference."""
    losses = {v.tokens: v.loss for v in first.validations}
    same_text = run is first or values["difference"] is not None
    both = [v for v in run.validations if v.tokens in losses and same_text]
    axes.plot([v.tokens for v in both], [v.loss - losses[v.tokens] for v in both], **style)
    if values["difference_margin_95"] is not None and run.last("tokens") == first.last("tokens"):
        at = run.last("tokens"), values["difference"]
        axes.errorbar(*at, values["difference_margin_95"], color=style["color"], capsize=5)


def draw_over_seeds(axes, first, kind, style):
    """Against tokens, the mean over seeds of what one kind loses more than the first, both {seed: run}; its margin."""
    a, b = ([{v.tokens: v.loss for v in runs[seed].validations} for seed in first] for runs in (first, kind))
    tokens = sorted(set.intersection(*map(set, a + b)))
    pairs = [paired(*(np.array([losses[t] for losses in x]) for x in (a, b))) for t in tokens]
    mean, margin = np.array(pairs).reshape(-1, 2).T
    axes.plot(tokens, mean, **style)
    axes.fill_between(tokens, mean - margin, mean + margin, color=style["color"], alpha=0.2, linewidth=0)
    if kind is not first:
        axes.errorbar(tokens[-1:], mean[-1:], margin[-1:], color=style["color"], capsize=5)


def draw(runs, rows, path):
    """A PNG: the loss against tokens and hours, the difference to the first against tokens. Raises UserError.

    Where two kinds have the same seeds, runs that are alike but for the seed share a colour, and differences are means
    over seeds.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure  # which draws without a display
    except ModuleNotFoundError as error:
        raise UserError("no figure without matplotlib: pip install -r requirements.txt") from error
    figure = Figure(figsize=(15, 5.5), dpi=150, layout="constrained")
    by_tokens, by_hours, by_difference = figure.subplots(1, 3)
    kinds = kinds_of(runs)
    paired_kinds = [len(kind) > 1 and kind.keys() == kinds[0].keys() and of_one_text(kinds[0], kind) for kind in kinds]
    by_seed = sum(paired_kinds) > 1
    if by_seed:
        shown = [run.path for kind in kinds for run in kind.values()]  # not one without a validation, or a seed again
        others = [{run.config.seed: run} for run in runs if run.path not in shown]
        kinds, paired_kinds = kinds + others, paired_kinds + [False] * len(others)
    else:
        kinds = [{run.config.seed: run} for run in runs]
    lines, labels = [], []
    for i, kind in enumerate(kinds):
        style = {"color": COLOURS[i % 7], "marker": "os^Dv<>"[i % 7], "linestyle": "-" if i < 7 else "--", "ms": 4}
        for run in kind.values():
            tokens, hours, losses = ([getattr(v, f) for v in run.validations] for f in ("tokens", "hours", "loss"))
            (line,) = by_tokens.plot(tokens, losses, **style)
            by_hours.plot(hours, losses, **style)
        lines.append(line)
        labels.append(name_of(kind) if run.validations else f"{run.name} (no validation)")
        if not by_seed:
            draw_difference(by_difference, runs[0], run, rows[i], style)
        elif paired_kinds[i]:
            draw_over_seeds(by_difference, kinds[0], kind, style)
    if by_seed:
        by_difference.set_ylabel("difference to the first, mean over seeds (nats a token)")
        by_difference.set_title("band: 95%, over seeds", fontsize="medium")
    else:
        by_difference.set_ylabel("validation loss less that of the first run (nats a token)")
        by_difference.set_title("bars: 95%, over the choice of validation text", fontsize="medium")
    trained = [v.loss for run in runs for v in run.validations if v.step and math.isfinite(v.loss)]
    trained *= all(run.last("step") for run in runs if run.validations)
    for axes in (by_tokens, by_hours):
        axes.set_ylabel("validation loss (nats a token)")
        if trained:  # leaves out the loss of the initial weights, beside which all others are one flat line
            margin = 0.05 * (max(trained) - min(trained)) or 0.1
            axes.set_ylim(min(trained) - margin, max(trained) + margin)
    by_hours.set_xlabel("hours of training and validation")
    by_hours.locator_params(axis="x", nbins=5)
    for axes in (by_tokens, by_difference):
        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
    for axes in (by_tokens, by_hours, by_difference):
        axes.grid(alpha=0.3)
    try:
        # a name with two $ is no formula, and one of other scripts is drawn as boxes
        with rc_context({"text.parse_math": False}), warnings.catch_warnings(action="ignore"):
            columns = min(4, max(1, 140 // (max(map(len, labels)) + 8)))
            figure.legend(lines, labels, loc="outside lower center", ncols=columns)
            figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}): name a file in another place") from error


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, held against the first")
    parser.add_argument("--out", default="comparison.png", metavar="FILE", help="the figure, a PNG [comparison.png]")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print CSV in full precision, a row a run")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    add_fields(parser, ["device"])
    args = parser.parse_args(argv)
    if len(args.runs) < 2:
        raise UserError(f"{args.runs[0]}: one run has nothing to be compared with: give two or more")
    if Path(args.out).suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: the figure is a PNG, its name should end in .png")
    device = parse_value("device", args.device or "auto")
    folders = [Path(path).resolve().name for path in args.runs]
    names = folders if len(set(folders)) == len(folders) else args.runs
    names = [os.fsencode(name).decode(errors="replace") for name in names]  # which may not be UTF-8
    runs = [read_run(Path(path), name) for path, name in zip(args.runs, names, strict=True)]

    say = partial(print, file=sys.stderr if args.csv else sys.stdout, flush=True)
    say(first_line(runs), end="\n\n")
    first = runs[0]
    for run in runs:
        # without the losses of the first there is nothing to pair
        if run.evaluation is None and run.validations and (run is first or first.evaluation):
            machine = start_machine(device, run.config.dtype)
            try:
                run.evaluation = compute_evaluation(run, machine)
            except UserError as error:
                notice(f"no interval for {run.path}: {error}")
    rows = [row(run, first) for run in runs]
    if args.csv:
        print_csv(names, rows)
    else:
        print_table(names, rows, args.markdown)
    notes = [COVERAGE, *over_seeds(runs)]
    if found := differences(set_ups(runs)):
        notes.append(f"These runs had different set-ups, on which speed and memory depend: {listing(found)}")
    say("", *notes, sep="\n\n" if args.markdown else "\n")
    draw(runs, rows, args.out)
    notice(f"drew {args.out}")


if __name__ == "__main__":
    cli.run(main)
