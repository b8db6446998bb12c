"""Train GPT-2 with softmax or adaptive sparse alpha-entmax attention.

    python train_gpt2.py                                          a tiny byte-level GPT on any laptop, in minutes
    python train_gpt2.py --attention softmax --max_steps 100      any field of Config is a flag
    python train_gpt2.py --config configs/gpt2_124m.toml          the paper's run on one GPU
    torchrun --standalone --nproc_per_node 8 train_gpt2.py --config configs/gpt2_124m.toml     ... on eight

Continue a run that was stopped:

    python train_gpt2.py --config runs/NAME/config.toml --run_dir runs/NAME --resume auto
"""

import atexit
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import sys
import time
import tomllib
from collections import deque
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timedelta
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported later its defaults would hold the process group to Python's end
import torch.nn.functional as F

import checkpoint
import cli
from cli import Failure, Parser, Progress, UserError, nearest, notice, replacing, say
from data import hellaswag, python_stdlib
from data.hellaswag import HellaSwag
from data.shards import SHARD_FORMATS, TokenStream, find_shards, only_writer, training_batches
from data.tokenizer import END_OF_TEXT, VOCAB_SIZE, decode, load_tokenizer
from model import GPT, SIZES, GPTConfig, load_hf, rounded

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny.toml"
MAX_SKIPPED = 10  # steps in a row without a finite loss and gradient, before training gives up
TIMEOUT = timedelta(minutes=10)  # how long a process waits for the others before it fails
OUTLIER = 5  # standard deviations above the mean of the last 128 steps

# -----------------------------------------------------------------------------
# configuration


def option(default, help, choices=None, least=0, most=sys.float_info.max):
    return field(default=default, metadata={"help": help, "choices": choices, "least": least, "most": most})


@dataclass(frozen=True)
class Config:
    """A run. Every field is a flag and a key of the TOML files; what neither sets is as in the paper's recipe."""

    attention: str = option("entmax", "the causal attention", choices=("softmax", "entmax"))
    alpha: float = option(1.5, "of entmax: 1 is softmax, 2 is sparsemax, between them sparse", least=1, most=2)
    alpha_start: float = option(1.1, "alpha at the start, where it takes alpha_steps to alpha", least=1, most=2)
    alpha_steps: int = option(0, "steps over which alpha goes from alpha_start to alpha; 0: alpha throughout", least=0)
    qk_init_scale: float = option(1.0, "times the initial query and key weights, for either attention", least=0)
    tokenizer: str = option("gpt2", "what made the shards: sets the vocabulary", choices=tuple(VOCAB_SIZE))
    train_data: str = option("data/fineweb10B", "training shards: a file, a glob, or a folder of *_train_* files")
    val_data: str = option("data/fineweb10B", "validation shards: a file, a glob, or a folder of *_val_* files")
    shard_format: str = option("auto", "of .bin shards: auto is llm.c's, nanogpt has no header", choices=SHARD_FORMATS)
    run_dir: str = option("", "folder for config, log and checkpoints; empty: runs/<model>-<attention>-<date-time>")
    seed: int = option(1337, "of the initial weights, the data order and the samples", least=0, most=2**63 - 1)
    model: str = option("gpt2", "the size", choices=tuple(SIZES))
    sequence_length: int = option(1024, "tokens a sequence", least=1, most=2**30)
    batch_size: int = option(512, "sequences a step, over all ranks", least=1)
    micro_batch_size: int = option(16, "sequences a forward pass, on each rank", least=1)
    max_steps: int = option(18865, "optimizer steps; 0 validates and stops", least=0)
    learning_rate: float = option(6e-4, "its peak", least=0)
    warmup_steps: int = option(700, "steps of linear warm-up from zero", least=0)
    final_lr_fraction: float = option(0.0, "where the cosine ends, as a fraction of the peak", least=0, most=1)
    weight_decay: float = option(0.1, "of AdamW, on matrices and embeddings only", least=0)
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no clipping", least=0)
    val_every: int = option(250, "steps between validations; 0: only after the last step", least=0)
    val_tokens: int = option(10_485_760, "tokens of a validation, from the start of the validation shards", least=1)
    checkpoint_every: int = option(1000, "steps between checkpoints; 0: only after the last step", least=0)
    keep_checkpoints: int = option(2, "the newest checkpoints to keep; 0: all", least=0)
    sample_every: int = option(0, "steps between printed samples of text, and one at the end; 0: never", least=0)
    hellaswag: str = option("", "HellaSwag's validation set to answer: a .jsonl file, or download; empty: none")
    hellaswag_every: int = option(250, "steps between HellaSwag evaluations; 0: only after the last step", least=0)
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option("bfloat16", "of activations on CUDA, elsewhere float32", choices=("float32", "bfloat16"))
    compile: bool = option(False, "torch.compile the model")
    deterministic: bool = option(False, "on CUDA: the same bits from the same command, at some cost in speed")
    resume: str = option("never", "never, auto (run_dir's newest sound one), or a checkpoint; later ones are deleted")
    init_from: str = option("", "start from a Hugging Face GPT-2, a folder or a hub name, which also sets the size")


def parse_value(name, value, is_flag=True):
    """A flag's text, or a TOML value, as the type of the field, within its choices or bounds; UserError otherwise."""
    kind, limits = Config.__dataclass_fields__[name].type, Config.__dataclass_fields__[name].metadata
    wanted = {str: "UTF-8 text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
    try:
        if is_flag and type(value) is str and kind is not str:
            value = {"true": True, "false": False}[value] if kind is bool else kind(value)
        elif kind is float and type(value) is int:
            value = float(value)
        if type(value) is str:
            value.encode()  # a name that is not UTF-8 has characters that this refuses
        sound = type(value) is kind and (kind is not float or math.isfinite(value))
        sound = sound and (kind is not str or "\0" not in value)
    except (KeyError, ValueError, OverflowError):
        sound = False
    if not sound:
        raise UserError(f"{name} should be {wanted}, not {value!r}")
    choices, least, most = limits["choices"], limits["least"], limits["most"]
    if choices and value not in choices:
        raise UserError(f"{name} should be one of {', '.join(choices)}, not {value!r}")
    if kind in (int, float) and not least <= value <= most:
        span = f"from {least} to {most}" if most < sys.float_info.max else f"at least {least}"
        raise UserError(f"{name} should be {span}, not {value}")
    return value


def read_toml(path):
    """The fields that a configuration file sets, checked. Raises UserError that names the file."""
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, no such day, a number of thousands of digits
        raise UserError(f"--config {path}: not valid TOML: {error}") from error
    known = Config.__dataclass_fields__
    for name in values:
        if name not in known:
            raise UserError(f"--config {path}: unknown key {name!r}{nearest(name, known)}")
    try:
        return {name: parse_value(name, value, is_flag=False) for name, value in values.items()}
    except (UserError, ValueError) as error:  # ValueError: a number too long to be printed
        raise UserError(f"--config {path}: {error}") from error


def to_toml(config, without=()):
    """The configuration as TOML text."""
    lines = [
        # JSON's spelling of strings, numbers and booleans is TOML's too, but for one character
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n".replace("\x7f", "\\u007f")
        for name, value in asdict(config).items()
        if name not in without
    ]
    return "".join(lines)


def add_fields(parser, names, defaults=None):
    """Give the parser a flag for each named field of Config; a flag that is not used is None."""
    for name in names:
        f = Config.__dataclass_fields__[name]
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        default = f" [{json.dumps(defaults[name])}]" if defaults else ""
        help = (f.metadata["help"] + choices + default).replace("%", "%%")  # argparse formats it
        parser.add_argument(f"--{name}", metavar=f.type.__name__.upper(), help=help)


def parse_config(argv=None):
    """Config from the command line: the flags over the file of --config over the defaults."""
    first = Parser(add_help=False)
    first.add_argument("--config", default=str(DEFAULT_CONFIG), metavar="FILE")
    from_file = asdict(Config()) | read_toml(first.parse_known_args(argv)[0].config)
    epilog = (
        "In brackets: the value without the flag, from the --config file (configs/tiny.toml when none is given) or, "
        "where that does not say, the paper's recipe for GPT-2 124M."
    )
    parser = Parser(description=__doc__, epilog=epilog, parents=[first])
    add_fields(parser, Config.__dataclass_fields__, defaults=from_file)
    flags = {k: v for k, v in vars(parser.parse_args(argv)).items() if k != "config" and v is not None}
    try:
        config = Config(**from_file | {name: parse_value(name, text) for name, text in flags.items()})
    except UserError as error:
        raise UserError(f"--{error}") from error
    if config.warmup_steps > config.max_steps > 0:
        raise UserError(
            f"warmup_steps {config.warmup_steps} is longer than the run, max_steps {config.max_steps}: lower "
            f"--warmup_steps too, say to {config.max_steps // 10}"
        )
    if "alpha_start" in flags and not config.alpha_steps:
        raise UserError("--alpha_start has no effect without --alpha_steps, the steps that alpha takes to its end")
    if config.init_from and "model" in flags:
        raise UserError("--model has no effect with init_from, which sets the size: leave one out")
    if config.init_from and config.qk_init_scale != 1:
        raise UserError("qk_init_scale is for new weights, those of init_from are taken as they are: leave one out")
    if config.attention == "entmax" and config.alpha_steps > config.max_steps > 0:
        raise UserError(
            f"alpha_steps {config.alpha_steps} is longer than the run, max_steps {config.max_steps}: it would not come "
            f"to alpha {config.alpha}; lower --alpha_steps too, say to {config.max_steps * 9 // 10}"
        )
    return config


# -----------------------------------------------------------------------------
# the machine: signals, ranks, device, precision


class Stop:
    """Inside `with`, notes the first of some signals, so that training ends in order; a second SIGINT kills.

    name: of the signal, None before.
    """

    def __init__(self):
        self.name, self.since, self.before = None, 0.0, {}

    def __enter__(self):
        for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has not all of them
            if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):  # which nohup asks for
                self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if self.name is None:
            self.name, self.since = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.since > 0.5:  # torchrun passes on what all have got
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


@dataclass(frozen=True)
class Machine:
    """This process among those of torchrun, its device, and the precision of its activations."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    autocast: bool = False  # bfloat16 activations; the weights stay float32
    stop: Stop | None = None  # what may ask this process to stop
    control: object = None  # the process group that talks by way of the CPU, if that is not the default one

    def zeros(self, n):
        """(n,) zeros on the device to sum losses in: float64, where the device has that."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.zeros(n, dtype=dtype, device=self.device)

    def sum(self, tensor):
        """The sum of a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_rank_0(self, function):
        """What function() returns on rank 0, or its UserError or Failure, on every rank."""
        result = [None]
        if self.rank == 0:
            try:
                result = [function()]
            except (UserError, Failure) as error:
                result = [error]
        if self.world_size > 1:
            dist.broadcast_object_list(result, src=0)
        if isinstance(result[0], UserError | Failure):
            raise result[0]
        return result[0]

    def stopping(self):
        """Whether any rank was asked to stop. All ranks call it, as often, and have the same answer."""
        if self.stop is None or self.world_size == 1:
            return self.stop is not None and self.stop.name is not None
        asked = torch.tensor(self.stop.name is not None, dtype=torch.int32)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.control)
        return bool(asked)

    def check_agreement(self, **facts):
        """Raise UserError on every rank if one holds other facts (dictionaries) than rank 0."""
        everyone = [facts]
        if self.world_size > 1:
            everyone = [None] * self.world_size
            dist.all_gather_object(everyone, facts, group=self.control)
        for rank, other in enumerate(everyone):
            for fact, values in everyone[0].items():
                for key in values:
                    if values[key] != other[fact][key]:
                        here = f"{values[key]!r} on process 0, {other[fact][key]!r} on process {rank}"
                        raise UserError(f"the processes differ in {fact}: {key} is {here}; start all of them alike")

    def precision(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()


def start_machine(device, dtype, deterministic=False, stop=None):
    """Choose the device, and join the other processes when torchrun started this one. Raises UserError."""
    try:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError as error:
        raise UserError(f"RANK and WORLD_SIZE should be whole numbers, as torchrun sets them ({error})") from error
    if not 0 <= rank < world_size:
        raise UserError(f"RANK {rank} is none of WORLD_SIZE {world_size}: start with torchrun, or unset both")
    mps = torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if mps and world_size == 1 else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: PyTorch sees no CUDA GPU here; use --device cpu")
    if device == "mps" and (not mps or world_size > 1):
        raise UserError("device mps: " + ("not for several processes" if mps else "not there") + "; use --device cpu")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(f"torchrun started process {local_rank + 1} on a machine of {gpus} GPUs: start one a GPU")
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    elif dtype == "bfloat16" and rank == 0:
        notice(f"dtype bfloat16 is for CUDA: float32 on {device}")
    if world_size > 1:
        try:
            with ending_at_once():
                backend, store = "nccl" if device == "cuda" else "gloo", store_of_this_start(rank, world_size)
                dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
        except (ValueError, RuntimeError) as error:
            if "EADDRINUSE" in str(error):
                port = os.environ.get("MASTER_PORT")
                raise UserError(f"MASTER_PORT {port} is in use: take another, or torchrun --standalone") from error
            if isinstance(error, ValueError):
                raise UserError(f"WORLD_SIZE is {world_size}: {error}: start with torchrun, or unset it") from error
            raise
        control = dist.new_group(backend="gloo", timeout=TIMEOUT) if device == "cuda" else None
        atexit.register(dist.destroy_process_group)
    return Machine(
        device=torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device),
        rank=rank,
        world_size=world_size,
        autocast=device == "cuda" and dtype == "bfloat16",
        stop=stop,
        control=control if world_size > 1 else None,
    )


@contextmanager
def ending_at_once():
    """Let SIGINT and SIGTERM end a process that waits for the others: Python's own handlers would wait with it."""
    numbers = (n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) not in (None, signal.SIG_IGN))
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def store_of_this_start(rank, world_size):
    """Where the processes that were started together leave their addresses for one another.

    torchrun's store outlives a restart, with the addresses of the dead in it, and its count of restarts differs between
    machines. So process 0 names a part of the store for this start, and tells the name to the processes that ask.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    name = uuid4().hex
    if rank == 0:
        store.delete_key("exception_dump")  # NCCL's sign of a failure, which is in no part: whoever sees it ends
        for other in range(1, world_size):
            while (word := store.queue_pop(f"to process 0 from {other}").decode()) != name:  # until it says the name
                store.set(word, name)  # the answer; nobody reads one to a question of the dead
    else:
        store.queue_push(f"to process 0 from {rank}", name)  # a name of its own: where it finds the answer
        name = store.get(name).decode()
        store.queue_push(f"to process 0 from {rank}", name)
    return dist.PrefixStore(name, store)


PEAK_FLOPS = {  # dense bfloat16, from the vendor's data sheets; the first name that fits counts
    "Laptop": None,  # these have other figures than the cards whose names they begin with
    " Ti": None,
    " NVL": None,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device):
    """Peak dense bfloat16 FLOP/s of a CUDA device, None where the table does not know it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for card, flops in PEAK_FLOPS.items() if card in name), None)


def code_version():
    """A short hash of the program's own files."""
    folder, digest = Path(__file__).parent, sha256()
    for path in sorted([*folder.glob("*.py"), *folder.glob("data/*.py"), *folder.glob("adasplash_kernels/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def versions(*packages):
    """{package: its version, None where it is not installed}."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def machine_record(machine):
    """Versions and machine, for the log."""
    return versions("torch", "triton", "numpy") | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else str(machine.device),
        "threads": torch.get_num_threads(),
        "world_size": machine.world_size,
        "code": code_version(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


# -----------------------------------------------------------------------------
# the run directory: config.toml, log.jsonl, checkpoint_<step>

MAY_DIFFER = set("run_dir resume init_from deterministic micro_batch_size device compile keep_checkpoints".split())
MAY_DIFFER |= {"hellaswag", "shard_format"}  # the tokens that come of a format are compared
MAY_DIFFER |= {f.name for f in fields(Config) if f.name.endswith("_every")}


class RunLog:
    """log.jsonl, one JSON object an event, each flushed. A step is in it once, also after a resume (see open_run)."""

    def __init__(self, path):
        self.path, self.file = path, open(path, "a")

    def write(self, step, **values):
        """NaN and infinity, which JSON has not, become null. Raises Failure if the disk takes no more."""
        values = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}
        try:
            if not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = open(self.path, "a")
                notice(f"{self.path} is gone: a new one begins with step {step}")
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        except OSError as error:
            raise Failure(
                f"{self.path}: cannot be written ({error.strerror}): training stopped at step {step}; make room, then "
                "--resume auto goes on from the newest checkpoint"
            ) from error


class NoLog:
    """What the other ranks write to."""

    def write(self, step, **values):
        pass


def read_log(path):
    """(the records up to the first damage, the number of the damaged line or None). Raises OSError.

    A last line that is cut short, or being written, is no damage.
    """
    *lines, last = path.read_text(errors="replace").split("\n")
    records = []
    for number, line in enumerate([*lines, last], 1):
        try:
            record = json.loads(line)
            record["step"] + 0
        except (ValueError, TypeError, KeyError):
            return records, number if number <= len(lines) else None
        records.append(record)
    return records, None


def records_until(records, last_step, evaluated):
    """Those up to a step, without the evaluations of that one unless all are done."""
    kept = [record for record in records if record["step"] <= last_step]
    if evaluated:
        return kept
    return [r for r in kept if r["step"] < last_step or not {"val_loss", "hellaswag_acc"} & r.keys()]


def saved_config(state):
    """The Config of a checkpoint's run. Raises ValueError and others if this program has no such fields or values."""
    try:
        return Config(**{name: parse_value(name, value, is_flag=False) for name, value in state["config"].items()})
    except UserError as error:
        raise ValueError(error) from error


def choose_start(config, claims):
    """The run's folder, None for one that has no name yet, and the checkpoint to resume from, None for a fresh start.

    claims: an ExitStack that keeps other processes from training in that folder for as long as it lasts.
    """
    resumed = None
    if config.resume == "auto" and not config.run_dir:
        raise UserError("--resume auto needs --run_dir, the folder of the run to go on with")
    if config.resume not in ("never", "auto"):
        if os.path.isdir(config.resume):
            raise UserError(f"--resume {config.resume} is a folder: use --run_dir {config.resume} --resume auto")
        if not os.path.isfile(config.resume):
            raise UserError(f"--resume {config.resume}: no such checkpoint (never, auto, or a checkpoint's path)")
        resumed = Path(config.resume)
    if not config.run_dir and not resumed:
        return None, None
    run_dir = Path(config.run_dir) if config.run_dir else resumed.parent
    holds_a_run = any(os.path.exists(run_dir / name) for name in ("config.toml", "log.jsonl"))
    holds_a_run = holds_a_run or checkpoint.checkpoints(run_dir)
    goes_on = config.resume == "auto" or resumed and resumed.parent.resolve() == run_dir.resolve()
    if holds_a_run and not goes_on:
        raise UserError(
            f"--run_dir {run_dir} holds a run: --config {shlex.quote(f'{run_dir}/config.toml')} --resume auto goes on "
            "with it, or name another folder"
        )
    if config.resume == "auto":
        if os.access(run_dir, os.W_OK):  # now, or two could go on from one checkpoint
            claims.enter_context(only_writer(run_dir, "--run_dir"))
        resumed = checkpoint.newest_sound(run_dir)
        if resumed is None and checkpoint.checkpoints(run_dir):
            raise UserError(f"--run_dir {run_dir}: no checkpoint is sound; move them away to start at step 0 there")
        if resumed is None:
            notice(f"--run_dir {run_dir} holds no checkpoint to go on from: starting at step 0")
    return run_dir, resumed


def make_run_dir(config, run_dir, resumed, claims):
    """The run's folder, made and claimed (see choose_start) now that nothing else stands in the way of the run."""
    name = f"runs/{config.model}-{config.attention}-{datetime.now():%Y%m%d-%H%M%S}"
    names = (Path(f"{name}-{i}" if i else name) for i in itertools.count())
    while run_dir is None:
        path = next(names)
        try:
            path.mkdir(parents=True)
            run_dir = path
        except OSError as error:
            if not os.path.lexists(path):  # else it is another run's, of this second
                raise UserError(f"{path}: cannot be made ({error.strerror}): name a folder by --run_dir") from error
    claims.enter_context(only_writer(run_dir, "--run_dir"))
    if not resumed and checkpoint.checkpoints(run_dir):
        raise UserError(f"--run_dir {run_dir} holds a run by now, of another process: name another folder")
    return run_dir


def check_resumable(config, state, data):
    """Refuse to resume a checkpoint whose run another configuration or other data would change."""
    saved, problems, moved = saved_config(state), [], ""
    softmax = config.attention == "softmax"
    for name, new in asdict(config).items():
        old = getattr(saved, name)
        if new == old and name not in data or name in MAY_DIFFER or softmax and name.startswith("alpha"):
            continue
        if name in data:
            if data[name] != state["data"][name]:
                problems.append(f"{name} {new!r} does not hold the shards that it held ({old!r})")
        elif name == "max_steps" and new > old:
            moved = f"max_steps was {old}, now {new}: the end of the learning-rate schedule moves"
        else:
            problems.append(f"{name} was {old!r}, now {new!r}")
    if problems:
        raise UserError(f"cannot resume step {state['step']} with another configuration: {'; '.join(problems)}")
    if moved:
        notice(moved)


def open_run(config, resumed, run_dir, step, evaluated):
    """Write the run's config.toml, and cut its log and later checkpoints back to `step`. Raises UserError.

    A checkpoint of another run is copied there first, so that this one can go on from it again. A log that is damaged,
    or of another run, or of later checkpoints, is kept under another name.
    evaluated: whether all evaluations of that step are done, and stay in the log.
    """
    log, text = run_dir / "log.jsonl", to_toml(config, without=("run_dir", "resume"))
    fork = resumed and resumed.parent.resolve() != run_dir.resolve()
    later = [path for number, path in checkpoint.checkpoints(run_dir).items() if number > step]
    try:
        if resumed and resumed.exists():  # its own run may have deleted it by now
            checkpoint.copy(resumed, run_dir / f"checkpoint_{step}")
        with replacing(run_dir / "config.toml") as temporary:
            temporary.write_text(text, encoding="utf-8")
        source = resumed.parent / "log.jsonl" if resumed else log
        there, damaged = read_log(source) if source.exists() else ([], None)
        if damaged or there and later or not resumed and any("train_loss" in record for record in there):
            old = run_dir / f"log-{datetime.now():%Y%m%d-%H%M%S}.jsonl"
            shutil.copyfile(source, old)
            notice(f"{source} as it was{f', damaged in line {damaged},' if damaged else ''} is kept as {old}")
        earlier = records_until(there, step, evaluated) if resumed else []
        if step > 0 and not any("train_loss" in record for record in earlier):
            notice(f"{source} has no steps: the log begins with step {step}")
        with replacing(log) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in earlier))
        stale = [] if resumed else ["evaluation.npz", "sparsity.json"]  # compare.py takes them for this run's
        for path in [*run_dir.glob("checkpoint_*.tmp"), *(run_dir / name for name in stale)]:
            path.unlink(missing_ok=True)
        for path in later:
            path.unlink()
            notice(f"deleted {path}: the run goes on from step {step}")
    except OSError as error:
        for name in (f"checkpoint_{step}", "config.toml", "log.jsonl") if fork else ():
            (run_dir / name).unlink(missing_ok=True)
        raise UserError(f"--run_dir {run_dir}: cannot be written ({error.strerror})") from error
    print(f"# {run_dir}/config.toml\n{text}", flush=True)


def save_evaluation(run_dir, **arrays):
    """Write evaluation.npz: the last evaluation by sequence and by example, which compare.py pairs with another run's.

    step; sequence_length; val_data, a fingerprint of the shards; val_losses (windows,) float64, nats a token;
    hellaswag, a fingerprint of the examples, or ""; hellaswag_right (examples,) bool, by acc_norm.
    """
    path = run_dir / "evaluation.npz"
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        notice(f"{path}: cannot be written ({error.strerror}): compare.py will compute it from the checkpoint")


# -----------------------------------------------------------------------------
# the pieces of a step


def learning_rate(config, step):
    """Of the step with this number, from 1: linear from zero to the peak, then a cosine that ends after max_steps."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - 1 - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine)


def entmax_alpha(config, step):
    """Alpha once `step` steps are done: from alpha_start in a straight line, and alpha from alpha_steps on."""
    if step >= config.alpha_steps:
        return config.alpha
    return config.alpha_start + (config.alpha - config.alpha_start) * step / config.alpha_steps


def make_optimizer(model, config):
    """AdamW that decays matrices and embeddings, not biases and gains."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def load_optimizer(optimizer, state):
    """Take over the moments of a state_dict() of the same optimizer. Raises ValueError and others if not."""
    groups = optimizer.state_dict()["param_groups"]  # whose settings the configuration gives
    if [group["params"] for group in groups] != [group["params"] for group in state["param_groups"]]:
        raise ValueError("the optimizer is that of another model")
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    for parameter, moments in optimizer.state.items():
        if not {"step", "exp_avg", "exp_avg_sq"} == set(moments) or moments["step"].dim():
            raise ValueError("the optimizer is not AdamW")
        if not parameter.shape == moments["exp_avg"].shape == moments["exp_avg_sq"].shape:
            raise ValueError("the optimizer is that of another model")


def compile_model(model):
    """A GPT, compiled for one shape of batches and replayed as CUDA graphs where there is CUDA.

    What a graph returned, its next replay overwrites, so it is to be used, or copied, before.
    """
    return torch.compile(model, dynamic=False, fullgraph=True, mode="reduce-overhead")


class Gradients:
    """A GPT's gradients, to which the micro-batches of a step add theirs, in float32.

    With `fold`, which pays on a GPU, the blocks' weights are folded (see GPT.fold) and rounded once a step, and what
    their gradients add up to is taken back to the parameters once a step.

    weights: for GPT.forward. all: the parameters' gradients in one vector.
    """

    def __init__(self, model, machine, fold):
        parameters, self.model = list(model.parameters()), model
        self.all = torch.zeros(sum(p.numel() for p in parameters), device=machine.device)
        for parameter, gradient in zip(parameters, self.all.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        self.weights, self.sums = [], []
        if fold:
            parameters = [*model.wte.parameters(), *model.wpe.parameters(), *model.ln_f.parameters()]
            with machine.precision():
                folded = [rounded(x) if x.dim() == 2 else x for x in model.fold()]
            self.weights = [torch.empty_like(x, requires_grad=True) for x in folded]
            for weight in self.weights:
                torch._dynamo.mark_static_address(weight)  # so that a CUDA graph reads it where it is
            self.sums = [torch.empty_like(x, dtype=torch.float32) for x in self.weights]
        self.tensors = self.weights + parameters  # that a loss depends on
        self.totals = self.sums + [p.grad for p in parameters]

    def begin(self):
        self.all.zero_()
        if self.weights:
            torch._foreach_zero_(self.sums)
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.model.fold())

    def add(self, loss):
        gradients = torch.autograd.grad(loss, self.tensors)  # backward() would add them one by one
        for dtype in {x.dtype for x in gradients}:  # float32 by one launch; what is rounded would prevent that
            pairs = [(total, x) for total, x in zip(self.totals, gradients, strict=True) if x.dtype == dtype]
            torch._foreach_add_(*zip(*pairs, strict=True))

    def end(self):
        if self.weights:
            torch.autograd.backward(self.model.fold(), self.sums)


def add_gradients(model, gradients, batches, micro_batches, machine):
    """Forward and backward over a step's micro-batches; model: a GPT, or that compiled, with these gradients.

    Leaves the mean of the gradients over all ranks, and returns that of the loss, () float32; None when asked to stop.
    """
    loss = torch.zeros((), device=machine.device)
    gradients.begin()
    for _ in range(micro_batches):
        if machine.stopping():
            return None
        inputs, targets = next(batches)
        with machine.precision():
            micro_loss = model(inputs, targets, "mean", gradients.weights) / micro_batches
        gradients.add(micro_loss)
        loss += micro_loss.detach()
    gradients.end()
    if machine.world_size > 1:
        machine.sum(gradients.all).div_(machine.world_size)
    return machine.sum(loss) / machine.world_size


def z_score(recent, value):
    """How many standard deviations a value is above the mean of a deque, which it joins; 0 until that is full."""
    if not math.isfinite(value):
        return 0.0
    recent.append(value)
    mean = statistics.fmean(recent)
    deviation = math.sqrt(statistics.fmean((x - mean) ** 2 for x in recent))
    return (value - mean) / deviation if len(recent) == recent.maxlen and deviation else 0.0


def check_fits(model, tokenizer, sequence_length):
    """Refuse a model with another vocabulary than the tokenizer's, or with too few positions."""
    vocab_size, n_positions = model.config.vocab_size, model.config.n_positions
    if vocab_size != VOCAB_SIZE[tokenizer]:
        raise UserError(f"tokenizer {tokenizer} has {VOCAB_SIZE[tokenizer]} ids, the model {vocab_size}")
    if sequence_length > n_positions:
        raise UserError(f"sequence_length {sequence_length} is longer than the model's {n_positions} positions")


def check_tokens(stream, tokenizer):
    """Refuse shards of bytes for another tokenizer, whose vocabulary has all their ids."""
    if tokenizer != "bytes" and stream.begins.max() < VOCAB_SIZE["bytes"]:
        raise UserError(f"tokenizer {tokenizer}: {stream.paths[0]} holds bytes, use --tokenizer bytes")


def validation_windows(stream, tokens, quiet):
    """How many sequences a validation on so many tokens takes; a line on stderr when the shards hold fewer."""
    wanted = tokens // stream.sequence_length
    if wanted < 1:
        raise UserError(f"val_tokens {tokens} is less than one sequence of {stream.sequence_length}")
    if wanted > stream.windows and not quiet:
        used = stream.windows * stream.sequence_length
        notice(f"val_data holds {stream.tokens} tokens, not val_tokens = {tokens}: each validation uses all {used}")
    return min(wanted, stream.windows)


@torch.no_grad()
def validate(model, stream, windows, micro_batch_size, machine, quiet=True):
    """The mean loss in nats a token of a stream's first windows, the same whatever the micro-batches and ranks.

    Returns (mean, the losses of the windows, a (windows,) float64 CPU tensor) on every rank, None when asked to stop.
    """
    losses = machine.zeros(windows)
    progress = Progress(windows, "sequences", "validating", quiet=quiet or machine.rank > 0)
    for start in range(0, windows, machine.world_size * micro_batch_size):
        if machine.stopping():
            return None
        first = start + machine.rank * micro_batch_size
        last = min(first + micro_batch_size, windows)
        if first < last:
            # the last micro-batch repeats its last window, so that all have one shape and compile once
            batch = torch.from_numpy(stream.batch(min(w, last - 1) for w in range(first, first + micro_batch_size)))
            batch = batch.to(machine.device)
            with machine.precision():
                token_losses = model(batch[:, :-1], batch[:, 1:])
            losses[first:last] = token_losses.to(losses.dtype).mean(dim=1)[: last - first]
        progress.update(min(machine.world_size * micro_batch_size, windows - start))
    progress.close()
    losses = machine.sum(losses).cpu().double()
    return losses.mean().item(), losses


@torch.no_grad()
def answer_hellaswag(model, questions, micro_batch_tokens, machine, quiet=True):
    """Which examples of a HellaSwag a model answers right, the same whatever the ranks: see HellaSwag.right().

    None when asked to stop.
    """
    losses = machine.zeros(len(questions.rows))
    progress = Progress(len(questions.rows), "endings", "HellaSwag", quiet=quiet or machine.rank > 0)
    for i, (rows, *batch) in enumerate(questions.batches(micro_batch_tokens)):
        if machine.stopping():
            return None
        if i % machine.world_size == machine.rank:
            inputs, targets, in_ending = (tensor.to(machine.device) for tensor in batch)
            with machine.precision():  # logits for the endings alone: the contexts are longer
                logits = model.logits(model.hidden(inputs)[in_ending])
            token_losses = F.cross_entropy(logits.float(), targets[in_ending], reduction="none")
            of_row = rows.to(machine.device)[in_ending.nonzero()[:, 0]]
            losses.index_add_(0, of_row, token_losses.to(losses.dtype))
        progress.update(len(rows))
    progress.close()
    return questions.right(machine.sum(losses).cpu().double())


def print_sample(model, config, machine, tokenizer, step):
    """Print a short text of the model, from an empty document."""
    generator = torch.Generator().manual_seed(config.seed + step)
    try:
        with machine.precision():
            tokens = list(model.generate([END_OF_TEXT[config.tokenizer]], 200, temperature=0.8, generator=generator))
    except UserError as error:
        return notice(f"no sample after step {step}: {error}")
    # an untrained model writes what would switch a terminal's colours, and worse
    text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in decode(tokenizer, tokens))
    say(f"--- a sample after {step} steps ---\n{text}\n---")


# -----------------------------------------------------------------------------
# training


def train(config, stop, claims):
    """claims: an ExitStack, which ends after the run."""
    machine = start_machine(config.device, config.dtype, config.deterministic, stop)
    device, rank, world_size = machine.device, machine.rank, machine.world_size
    torch.manual_seed(config.seed)

    # data
    if python_stdlib.FOLDER in (config.train_data, config.val_data):
        machine.from_rank_0(python_stdlib.make_shards)
    at_once = config.micro_batch_size * world_size
    if config.batch_size % at_once:
        below = config.batch_size // at_once * at_once
        valid = " or ".join(str(n) for n in (below, below + at_once) if n)
        raise UserError(
            f"batch_size {config.batch_size} is not a multiple of micro_batch_size {config.micro_batch_size} "
            f"x {world_size} ranks = {at_once}: use batch_size {valid}, or a smaller micro_batch_size"
        )
    micro_batches = config.batch_size // at_once
    vocab_size, T = VOCAB_SIZE[config.tokenizer], config.sequence_length
    shard_format = config.shard_format
    train_stream = TokenStream(find_shards(config.train_data, "train", "train_data"), T, vocab_size, shard_format)
    val_stream = TokenStream(find_shards(config.val_data, "val", "val_data"), T, vocab_size, shard_format)
    for stream in (train_stream, val_stream):  # ids beyond the vocabulary are refused where they are read
        stream.batch({min(w, stream.windows - 1) for w in stream.first_window.tolist()})
    val_windows = validation_windows(val_stream, config.val_tokens, quiet=rank > 0)
    fingerprints = {"train_data": train_stream.fingerprint(), "val_data": val_stream.fingerprint()}

    settings = {k: v for k, v in asdict(config).items() if k not in ("train_data", "val_data", "hellaswag")}
    machine.check_agreement(program={"version": code_version()}, configuration=settings, data=fingerprints)

    # where to start from: a checkpoint, someone else's weights, or new ones
    run_dir, resumed = machine.from_rank_0(lambda: choose_start(config, claims))
    start, evaluated = 0, False
    recent_losses, recent_norms = deque(maxlen=128), deque(maxlen=128)
    if resumed:
        state = checkpoint.load(resumed)
        with checkpoint.reading(resumed):
            check_resumable(config, state, fingerprints)
            start, evaluated = state["step"], bool(state["evaluated"])
        if start >= config.max_steps and evaluated:
            if rank == 0:
                notice(f"{run_dir} is finished: {start} of {config.max_steps} steps are done")
            return
        model = checkpoint.load_model(state)
    elif config.init_from:
        model = load_hf(config.init_from, config.attention, config.alpha)
    else:
        n_layer, n_head, n_embd = SIZES[config.model]
        model = GPT(GPTConfig(n_layer, n_head, n_embd, T, vocab_size, config.attention, config.alpha))
        model.init_weights(torch.Generator().manual_seed(config.seed), config.qk_init_scale)
    check_fits(model, config.tokenizer, T)
    for stream in (train_stream, val_stream):
        check_tokens(stream, config.tokenizer)
    questions = None
    if config.hellaswag:
        path = machine.from_rank_0(lambda: hellaswag.find(config.hellaswag))
        questions = HellaSwag(path, load_tokenizer(config.tokenizer), model.config.n_positions)
    model.to(device)
    if world_size > 1:  # CPUs differ in the last bits that they draw, and machines in what a name stands for
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=0)
    optimizer = make_optimizer(model, config)
    if resumed:
        with checkpoint.reading(resumed):
            load_optimizer(optimizer, state["optimizer"])
            torch.set_rng_state(state["rng"]["cpu"])
            if device.type == "cuda" and state["rng"]["cuda"] is not None:
                torch.cuda.set_rng_state(state["rng"]["cuda"])
            recent_losses.extend(map(float, state["recent"]["losses"]))
            recent_norms.extend(map(float, state["recent"]["norms"]))
        del state
    run_dir = machine.from_rank_0(lambda: make_run_dir(config, run_dir, resumed, claims))
    machine.from_rank_0(lambda: open_run(config, resumed, run_dir, start, evaluated))
    log = RunLog(run_dir / "log.jsonl") if rank == 0 else NoLog()
    if resumed and rank == 0:
        notice(f"going on from {resumed}")
    writer = checkpoint.Writer(run_dir, config.keep_checkpoints)

    def save(step, evaluated, leaving=False):
        if rank == 0:
            began = time.perf_counter()
            tensors = [*model.parameters(), *(x for moments in optimizer.state.values() for x in moments.values())]
            if not all(x.isfinite().all() for x in tensors):
                raise Failure(
                    f"the weights after step {step} are not finite, no checkpoint of them is written: --resume with an "
                    f"earlier one of {run_dir} goes on"
                )
            cuda_rng = torch.cuda.get_rng_state() if device.type == "cuda" else None
            state = {
                "step": step,  # also the position in the data: step * batch_size sequences are consumed
                "model": model.state_dict(),
                "gpt_config": asdict(model.config) | {"alpha": entmax_alpha(config, step)},
                "optimizer": optimizer.state_dict(),
                "rng": {"cpu": torch.get_rng_state(), "cuda": cuda_rng},
                "config": asdict(config),
                "data": fingerprints,
                "evaluated": evaluated,  # or is that left to the run that goes on?
                "recent": {"losses": list(recent_losses), "norms": list(recent_norms)},
            }
            writer.wait()
            state = checkpoint.copied(state)
            if not leaving:  # or the log would differ from that of a run never stopped
                log.write(step, event="checkpoint", training_waited_ms=1e3 * (time.perf_counter() - began))
            writer.write(state)

    def leave(step, evaluated, reason=None):
        if rank == 0:
            if writer.newest != step:
                save(step, evaluated, leaving=True)
            writer.finish()
            reason = reason or stop.name or "a signal to another process"
            quoted = shlex.quote(str(run_dir))
            go_on = f"--config {quoted}/config.toml --run_dir {quoted} --resume auto"
            notice(f"stopped by {reason} after step {step}: python train_gpt2.py {go_on}")

    compiled = compile_model(model) if config.compile else model
    gradients = Gradients(model, machine, fold=device.type == "cuda")

    parameters, width = sum(p.numel() for p in model.parameters()), model.config.n_layer * model.config.n_embd
    event = "resume" if resumed else "start"
    log.write(start, event=event, parameters=parameters, **fingerprints, **machine_record(machine))
    document_start = END_OF_TEXT[config.tokenizer]
    if rank == 0 and not (train_stream.begins == document_start).any():
        where = f"the first tokens of {train_stream.paths[0]}"
        notice(f"no document starts (id {document_start}) in {where}: were they made by tokenizer {config.tokenizer}?")
    shared = {path.resolve() for path in train_stream.paths} & {path.resolve() for path in val_stream.paths}
    if rank == 0 and shared:
        notice(f"{min(shared)} is in train_data and in val_data: the validation loss is of text that is trained on")
    tokenizer = sampling_tokenizer(config) if rank == 0 else None
    flops_per_token, peak = 6 * parameters + 12 * width * T, peak_flops(device)  # as in the PaLM paper, appendix B
    batches = training_batches(
        train_stream, config.seed, start * config.batch_size, config.micro_batch_size, device, rank, world_size
    )
    progress = None
    skipped, skipped_in_a_row, val_loss = 0, 0, math.nan

    try:
        for step in range(start, config.max_steps + 1):  # so many optimizer steps are done
            last_step, alpha = step == config.max_steps, entmax_alpha(config, step)
            model.set_alpha(alpha)

            if not evaluated:
                if last_step or due(step, config.val_every):
                    began = time.perf_counter()
                    result = validate(compiled, val_stream, val_windows, config.micro_batch_size, machine)
                    if result is None:
                        return leave(step, evaluated)
                    val_loss, val_losses = result
                    val_ms = 1e3 * (time.perf_counter() - began)
                    log.write(step, val_loss=val_loss, val_tokens=val_windows * T, val_ms=val_ms)
                    if rank == 0:
                        say(f"step {step} | validation loss {val_loss:.4f} nats a token")
                if questions and (last_step or due(step, config.hellaswag_every)):
                    right = answer_hellaswag(model, questions, config.micro_batch_size * T, machine)
                    if right is None:
                        return leave(step, evaluated)
                    acc_norm, acc = (x.double().mean().item() for x in right)
                    log.write(step, hellaswag_acc_norm=acc_norm, hellaswag_acc=acc)
                    if rank == 0:
                        say(f"step {step} | HellaSwag acc_norm {acc_norm:.4f}, acc {acc:.4f}")
                if last_step and rank == 0:
                    kept = {"step": step, "sequence_length": T, "val_data": fingerprints["val_data"]}
                    kept |= {"val_losses": val_losses, "hellaswag": questions.fingerprint if questions else ""}
                    save_evaluation(run_dir, **kept, hellaswag_right=right[0] if questions else [])
                if tokenizer and (last_step or due(step, config.sample_every)):
                    print_sample(model, config, machine, tokenizer, step)
                evaluated = True
                if last_step or step > 0 and due(step, config.checkpoint_every):
                    save(step, evaluated)
            if last_step:
                break

            # from here on, as its rate is that of steps
            progress = progress or Progress(config.max_steps, "steps", "training", done=step, quiet=rank > 0)
            began = time.perf_counter()
            loss = add_gradients(compiled, gradients, batches, micro_batches, machine)
            if loss is None:
                return leave(step, evaluated)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
            loss, grad_norm = loss.item(), grad_norm.item()  # waits for the device, once a step

            # update, unless that would spoil the weights
            lr = learning_rate(config, step + 1)
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            if finite:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
            step, evaluated = step + 1, False  # this step is done, its evaluations are not

            seconds = time.perf_counter() - began
            tokens_per_s = config.batch_size * T / seconds
            record = {"tokens": step * config.batch_size * T, "train_loss": loss, "grad_norm": grad_norm, "lr": lr}
            record |= {"alpha": alpha} if config.attention == "entmax" else {}
            record |= {"step_ms": 1e3 * seconds, "tokens_per_s": tokens_per_s}
            record |= {"mfu": flops_per_token * tokens_per_s / (peak * world_size) if peak else None}
            record |= {"peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None}
            outliers = {"loss_z": z_score(recent_losses, loss), "grad_norm_z": z_score(recent_norms, grad_norm)}
            record |= {name: z for name, z in outliers.items() if z > OUTLIER}
            log.write(step, **record, **({} if finite else {"skipped": True}))
            progress.update(1, f"loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s")

            skipped, skipped_in_a_row = skipped + (not finite), 0 if finite else skipped_in_a_row + 1
            if not finite and rank == 0:
                notice(f"step {step} skipped: loss {loss}, gradient norm {grad_norm}")
            if skipped_in_a_row == MAX_SKIPPED:
                save(step - MAX_SKIPPED, evaluated=True)
                writer.finish()
                raise Failure(
                    f"stopped: {MAX_SKIPPED} steps in a row had no finite loss or gradient. The weights from before "
                    f"are in {run_dir}/checkpoint_{step - MAX_SKIPPED}; a new run with a lower learning_rate may help"
                )
    except (UserError, RuntimeError, OSError):
        # a damaged shard, a lost process, a closed terminal: the weights are those of whole steps, and good
        if step > start:
            try:
                leave(step, evaluated, reason="an error")
            except Failure as failure:
                notice(str(failure))
        raise

    if progress:
        progress.close()
    writer.finish()
    if not math.isfinite(val_loss):
        raise Failure(f"{run_dir}: the validation loss at the end is {val_loss}; a lower learning_rate may help")
    if rank == 0:
        note = f", {skipped} steps skipped" if skipped else ""
        sample = f"python sample.py --run_dir {shlex.quote(str(run_dir))}"
        notice(f"done: validation loss {val_loss:.4f}{note}; {sample} writes text")


def due(step, every):
    return every > 0 and step % every == 0


def sampling_tokenizer(config):
    """The tokenizer for printed samples; None when none are asked for, or it is not to be had."""
    try:
        return load_tokenizer(config.tokenizer) if config.sample_every else None
    except UserError as error:
        notice(f"no samples during training: {error}")


def smaller_micro_batch(config):
    """Advice: the largest micro-batch up to half of this one that divides the batch."""
    each, micro_batch_size = config.batch_size // int(os.environ.get("WORLD_SIZE", 1)), config.micro_batch_size
    fits = [n for n in range(1, micro_batch_size // 2 + 1) if each % n == 0]
    if not fits:
        return f"micro_batch_size is {micro_batch_size}: take a shorter sequence_length or a smaller model"
    return f"use --micro_batch_size {fits[-1]} instead of {micro_batch_size}; the batches stay the same"


def main(argv=None):
    config = parse_config(argv)
    try:
        with Stop() as stop, ExitStack() as claims:
            train(config, stop, claims)
    except (RuntimeError, MemoryError) as error:
        cli.explain_memory(error, smaller_micro_batch(config))
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"compile: torch.compile does not work here ({reason}): use --compile false") from error
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            rank, reason = os.environ.get("RANK"), str(error).splitlines()[0]
            raise Failure(f"process {rank} lost the others ({reason}): --resume auto goes on") from error
        raise


if __name__ == "__main__":
    cli.run(main)
