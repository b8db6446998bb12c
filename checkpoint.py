"""Checkpoints: one file `checkpoint_<step>` in the run directory that exists only when it is complete.

A checkpoint is a dictionary of tensors and plain values, written by torch.save and read back with weights_only=True:
step, model (weights, float32), gpt_config, optimizer, rng, config (the run's fields), and fingerprints of its data.
"""

import errno
import os
import re
import shutil
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from cli import Failure, UserError, notice, replacing
from model import GPT, GPTConfig


def checkpoints(run_dir):
    """The checkpoints of a run by their step, {step: path}, oldest first. Raises UserError if nobody may look."""
    found = {}
    try:
        names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    except OSError as error:
        raise UserError(f"--run_dir {run_dir}: cannot be read ({error.strerror})") from error
    for name in names:
        path = Path(run_dir) / name
        if (match := re.fullmatch(r"checkpoint_(\d+)", name)) and os.path.isfile(path):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def save(state, run_dir, keep=0):
    """Write state as `checkpoint_<state["step"]>`, then delete all but the newest `keep` (0: delete none).

    Raises Failure if it cannot; older checkpoints are then all there.
    """
    path = Path(run_dir) / f"checkpoint_{state['step']}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have tidied up
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's RuntimeError hides that of the disk
        disk = error if isinstance(error, OSError) else error.__context__
        reason = disk.strerror if isinstance(disk, OSError) else f"{str(error).splitlines()[0]}: is the disk full?"
        raise Failure(f"{path}: cannot be written ({reason})") from error
    for old in list(checkpoints(run_dir).values())[:-keep] if keep else []:
        try:
            if old != path:  # which steps without effect may have followed
                old.unlink(missing_ok=True)
        except OSError as error:
            notice(f"{old}: cannot be deleted ({error.strerror})")


def copy(path, to):
    """Make `to` a copy of a checkpoint, whole or not there, unless it is that file. Raises OSError."""
    if not (to.exists() and to.samefile(path)):
        with replacing(to) as temporary:
            shutil.copyfile(path, temporary)


def copied(state):
    """A copy of nested dictionaries and lists with their tensors on the CPU, apart from those that training changes."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return [copied(value) for value in state] if isinstance(state, list) else state


class Writer:
    """Writes the checkpoints of a run in a thread, one at a time, so that training waits for their copies alone."""

    def __init__(self, run_dir, keep):
        self.run_dir, self.keep, self.newest = run_dir, keep, None  # newest: the step of the last that was begun
        self.thread, self.writing = ThreadPoolExecutor(max_workers=1), None

    def write(self, state):
        """Begin to write a state of which nothing changes any more, after wait() or finish()."""
        self.newest = state["step"]
        self.writing = self.thread.submit(save, state, self.run_dir, self.keep)

    def finish(self):
        """Wait for the write that was begun. Raises Failure if it did not succeed."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def wait(self):
        """The same for training that goes on: a line on stderr if the write did not succeed."""
        try:
            self.finish()
        except Failure as failure:
            notice(f"{failure} Training goes on")


def sync_folder(folder):
    """Make renames in the folder outlast a power cut, where the system can (Windows cannot open folders)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def is_sound(path):
    """Whether every byte of the file is what was written, by the checksums that torch.save puts in it.

    Raises UserError if that cannot be told, as it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # no checksum holds these, and PyTorch leaves a tensor that is marked as a folder (16) unwritten
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.external_attr & 16 for entry in entries):
                return False
            return archive.testzip() is None
    except OSError as error:
        if error.errno == errno.EINVAL:  # a damaged table sends the reader to places that no file has
            return False
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except MemoryError:
        raise
    except Exception:  # there is one for each kind of damage
        return False


def newest_sound(run_dir):
    """The path of a run's newest sound checkpoint, or None; a line on stderr for each that had to be passed over."""
    for path in reversed(checkpoints(run_dir).values()):
        if is_sound(path):
            return path
        notice(f"{path} is damaged: passed over")
    return None


@contextmanager
def reading(path):
    """Turn whatever a stranger's file leads to into a UserError that names it."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise UserError(f"{path}: not a checkpoint of this version of the program ({reason})") from error


def load(path):
    """Read one checkpoint to the CPU. Raises UserError if it is missing or damaged."""
    path = Path(path)
    if not os.path.isfile(path):
        hint = f"; --run_dir {path} takes the newest of a run" if os.path.isdir(path) else ""
        raise UserError(f"{path}: no such checkpoint{hint}")
    if not is_sound(path):
        raise UserError(f"{path}: damaged or not a checkpoint; take another one of its run")
    with reading(path):
        state = torch.load(path, map_location="cpu", weights_only=True)  # builds tensors and plain values, runs no code
        if type(state["step"]) is not int or state["step"] < 0:
            raise ValueError(f"step {state['step']!r}")
        load_model(state)
    return state


def load_from(run_dir, path):
    """What a command's --checkpoint or --run_dir names: that checkpoint, or the newest sound one of the run."""
    if path is not None:
        if not path:
            raise UserError("--checkpoint is empty: give a checkpoint's path")
        return load(path)
    if not os.path.isdir(run_dir):
        raise UserError(f"--run_dir {run_dir}: no such folder")
    newest = newest_sound(run_dir)
    if newest is None:
        raise UserError(f"--run_dir {run_dir}: holds no sound checkpoint")
    notice(f"reading {newest}")
    return load(newest)


def load_model(state):
    """The GPT of a checkpoint, on the CPU. Raises ValueError and others if the weights are not what its sizes say."""
    config, weights = GPTConfig(**state["gpt_config"]), state["model"]
    if asdict(config) != state["gpt_config"]:
        raise ValueError("gpt_config is not complete")
    if config.n_layer > len(weights):
        raise ValueError(f"{len(weights)} weights for {config.n_layer} layers")
    with torch.device("meta"):
        model = GPT(config)
    for name, parameter in model.named_parameters():
        if (weights[name].dtype, weights[name].shape) != (parameter.dtype, parameter.shape):
            raise ValueError(f"{name} is {weights[name].dtype} {tuple(weights[name].shape)}")
    model.load_state_dict(weights, assign=True)
    return model
