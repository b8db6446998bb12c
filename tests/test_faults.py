"""Runs that are killed, stopped, filled up and fed with NaN: python -m pytest tests/test_faults.py

The long ones, 25 kills and a soak of SOAK_MINUTES (2 without): python -m pytest -m slow -s tests/test_faults.py
"""

import errno
import json
import math
import os
import pty
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, read_log

import checkpoint
from checkpoint import checkpoints
from cli import Failure
from data.shards import BatchOrder, TokenStream, training_batches, write_shard
from train_gpt2 import main, z_score

# A run whose first micro-batch has no end. A signal that comes just before a sleep is noted after it: so it is short.
ENDLESS = """
import time
import cli, train_gpt2

def endless(*_):
    while True:
        time.sleep(0.05)

train_gpt2.add_gradients = endless
cli.run(train_gpt2.main)
"""

# A run that writes slowly: kills then fall inside checkpoint writes too.
SLOW_WRITES = """
import sys, time
import checkpoint, cli, train_gpt2

class Slow:
    def __init__(self, file):
        self.file = file

    def write(self, data):
        time.sleep(0.002)
        return self.file.write(data)

    def flush(self):
        self.file.flush()

save = checkpoint.torch.save
checkpoint.torch.save = lambda state, file: save(state, Slow(file))
cli.run(train_gpt2.main)
"""


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "undisturbed"
    command = [sys.executable, str(ROOT / "train_gpt2.py"), *flags, "--max_steps=12", f"--run_dir={folder}"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder


def assert_same_run(run_dir, expected):
    assert read_log(run_dir) == read_log(expected)
    logs = ((d / "log.jsonl").read_text() for d in (run_dir, expected))
    saves = [re.findall(r'"step": (\d+), "event": "checkpoint"', log) for log in logs]
    assert saves[0] == saves[1]
    steps = [r["step"] for r in read_log(run_dir) if "train_loss" in r]
    assert steps == list(range(1, len(steps) + 1))
    last = max(checkpoints(expected))
    ours, theirs = (torch.load(d / f"checkpoint_{last}", weights_only=True) for d in (run_dir, expected))
    for name in theirs["model"]:
        assert torch.equal(ours["model"][name], theirs["model"][name]), name
    for i, moments in theirs["optimizer"]["state"].items():
        assert all(torch.equal(ours["optimizer"]["state"][i][name], moments[name]) for name in moments)


def wait_until(condition, process, seconds=120):
    """Wait for a condition on the run of a process. Fails if the process ends before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode}: {process.communicate()[1].decode()}")
        time.sleep(0.002)
    process.kill()
    pytest.fail(f"waited in vain: {process.communicate()[1].decode()}")


def steps_logged(run_dir):
    try:
        return sum("train_loss" in line for line in (run_dir / "log.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


# -----------------------------------------------------------------------------
# killed


@pytest.mark.parametrize("kills", [5, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_anywhere(undisturbed, start, flags, tmp_path, kills):
    """SIGKILL at random moments; among them, by way of slow writes, in the middle of a checkpoint."""
    draw, in_write = random.Random(kills), 0
    run_dir = tmp_path / "killed"
    (tmp_path / "slow.py").write_text(SLOW_WRITES)
    command = [tmp_path / "slow.py", *flags, "--max_steps=12", "--run_dir=killed", "--resume=auto"]
    environment = {"PYTHONPATH": str(ROOT)}

    def log_time():
        return (run_dir / "log.jsonl").stat().st_mtime_ns if (run_dir / "log.jsonl").exists() else 0

    for _ in range(kills):
        before, process = log_time(), start(*command, env=environment)
        wait_until(lambda before=before: log_time() > before, process)  # most of the start is imports
        time.sleep(draw.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        in_write += any(run_dir.glob("checkpoint_*.tmp"))
    process = start(*command, env=environment)
    err = process.communicate()[1].decode()
    assert process.returncode == 0, err
    assert_same_run(run_dir, undisturbed)
    assert not list(run_dir.glob("*.tmp"))
    assert in_write or kills < 25


# -----------------------------------------------------------------------------
# asked to stop


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_stops_in_order(undisturbed, start, run, flags, tmp_path, name):
    if signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        pytest.skip("is ignored here, and so in the processes that are started from here")
    command = ["train_gpt2.py", *flags, "--max_steps=12", "--run_dir=stopped", "--resume=auto"]
    process = start(*command)
    wait_until(lambda: steps_logged(tmp_path / "stopped") >= 3, process)
    process.send_signal(getattr(signal, name))
    began = time.monotonic()
    err = process.communicate()[1].decode()
    assert process.returncode == 0 and f"stopped by {name}" in err, err
    assert time.monotonic() - began < 10
    step = max(checkpoints(tmp_path / "stopped"))
    assert f"after step {step}" in err
    code, _, err = run(*command)
    assert code == 0, err
    assert_same_run(tmp_path / "stopped", undisturbed)


STOPS_ITSELF = """
import os, signal
import cli, train_gpt2
calls = 0
batch = train_gpt2.TokenStream.batch
def counted(self, windows):
    global calls
    if 'val' in self.paths[0].name:
        calls += 1
        if calls == int(os.environ["VALIDATION"]) * self.windows + 3:
            os.kill(os.getpid(), signal.SIGTERM)
    return batch(self, windows)
train_gpt2.TokenStream.batch = counted
cli.run(train_gpt2.main)
"""


def test_stopped_in_a_validation(run, flags, tmp_path):
    """The validation that was broken off is done by the run that goes on, the last one too, and is in the log once."""
    long = [*flags, "--max_steps=12", "--micro_batch_size=1", "--val_tokens=1000000", "--val_every=4"]
    code, _, err = run("train_gpt2.py", *long, "--run_dir=whole")
    assert code == 0, err
    (tmp_path / "stops.py").write_text(STOPS_ITSELF)
    for validation, step in ((1, 4), (3, 12)):  # counted from 0
        command = [*long, f"--run_dir=stopped{step}", "--resume=auto"]
        environment = {"PYTHONPATH": str(ROOT), "VALIDATION": str(validation)}
        code, _, err = run(tmp_path / "stops.py", *command, env=environment)
        assert code == 0 and f"stopped by SIGTERM after step {step}" in err, err
        records = read_log(tmp_path / f"stopped{step}")
        assert [r["step"] for r in records if "val_loss" in r] == list(range(0, step, 4))
        code, _, err = run("train_gpt2.py", *command)
        assert code == 0, err
        assert_same_run(tmp_path / f"stopped{step}", tmp_path / "whole")


def test_nobody_reads_what_it_says(undisturbed, start, run, flags, tmp_path):
    """As after Ctrl-C with the output piped through tee: what cannot be printed costs nothing but the exit code."""
    command = ["train_gpt2.py", *flags, "--max_steps=12", "--checkpoint_every=0", "--run_dir=piped", "--resume=auto"]
    process = start(*command)
    wait_until(lambda: steps_logged(tmp_path / "piped") >= 2, process)
    process.stdout.close(), process.stderr.close()
    assert process.wait(60) == 1
    step = max(checkpoints(tmp_path / "piped"))
    assert step >= 2 and steps_logged(tmp_path / "piped") == step
    code, _, err = run(*command)
    assert code == 0, err
    assert read_log(tmp_path / "piped") == read_log(undisturbed)


def test_the_terminal_is_gone(start, flags, tmp_path):
    """Its SIGHUP did not come, as after `disown`."""
    ours, theirs = pty.openpty()
    command = ["train_gpt2.py", *flags, "--max_steps=100000", "--val_every=40", "--checkpoint_every=0", "--run_dir=run"]
    process = start(*command, stdout=theirs, stderr=theirs)
    os.close(theirs)
    threading.Thread(target=read_until_closed, args=[ours], daemon=True).start()
    wait_until(lambda: steps_logged(tmp_path / "run") >= 2, process)
    os.close(ours)
    assert process.wait(60) == 1
    assert list(checkpoints(tmp_path / "run")) == [steps_logged(tmp_path / "run")]


def read_until_closed(descriptor):
    with suppress(OSError):
        while os.read(descriptor, 10_000):
            pass


def test_the_output_finds_no_room(start, flags, tmp_path):
    with open("/dev/full", "w") as full:
        process = start("train_gpt2.py", *flags, "--run_dir=run", stdout=full)
    err = process.communicate()[1].decode()
    assert process.returncode == 1 and "Traceback" not in err, err
    assert "the output or a temporary file cannot be written (No space left on device)" in err, err


def test_a_second_interrupt_leaves_at_once(start, flags, tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    process = start(tmp_path / "endless.py", *flags, "--run_dir=run", env={"PYTHONPATH": str(ROOT)})
    log = tmp_path / "run" / "log.jsonl"
    wait_until(lambda: log.exists() and "val_loss" in log.read_text(), process)
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT


# -----------------------------------------------------------------------------
# several processes


def children(process):
    """The workers of a torchrun, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == process.pid:
                environment = (folder / "environ").read_bytes().split(b"\0")
                found[int(dict(e.split(b"=", 1) for e in environment if b"=" in e)[b"RANK"])] = int(folder.name)
        except (OSError, KeyError, IndexError):
            pass
    return found


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
def test_one_rank_is_asked_and_all_stop(undisturbed, start, run, flags, tmp_path):
    command = ["train_gpt2.py", *flags, "--max_steps=12", "--micro_batch_size=1", "--run_dir=stopped", "--resume=auto"]
    process = start(*command, ranks=2)
    wait_until(lambda: steps_logged(tmp_path / "stopped") >= 3, process)
    os.kill(children(process)[1], signal.SIGUSR1)
    err = process.communicate()[1].decode()
    assert process.returncode == 0 and "stopped by a signal to another process" in err, err
    # whatever the number of processes, the same batches follow
    assert "holds no checkpoint to go on from: starting at step 0" in err
    for ranks in (4, 2, 1):
        folder = tmp_path / f"ranks{ranks}"
        shutil.copytree(tmp_path / "stopped", folder)
        code, _, err = run(*command, f"--run_dir={folder}", ranks=ranks)
        assert code == 0, err
        for key in ("train_loss", "val_loss", "grad_norm"):
            ours, theirs = ([r[key] for r in read_log(d) if key in r] for d in (folder, undisturbed))
            np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def test_torchrun_passes_sigterm_on(start, flags, tmp_path):
    """Its own exit code says that it was stopped; the processes have left in order."""
    process = start("train_gpt2.py", *flags, "--max_steps=1000", "--micro_batch_size=2", "--run_dir=stopped", ranks=2)
    wait_until(lambda: steps_logged(tmp_path / "stopped") >= 3, process)
    process.terminate()
    err = process.communicate(timeout=60)[1].decode()
    assert "stopped by " in err and 'train_gpt2.py", line' not in err, err
    assert max(checkpoints(tmp_path / "stopped")) == steps_logged(tmp_path / "stopped")


@linux
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_killed_rank_ends_or_restarts_the_run(undisturbed, flags, tmp_path, restarts):
    """One restart is enough: the new processes do not look for the dead."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, f"--max-restarts={restarts}", str(ROOT / "train_gpt2.py"), *flags, "--max_steps=12"]
    command += ["--micro_batch_size=2", f"--run_dir={tmp_path / 'run'}", "--resume=auto"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    wait_until(lambda: steps_logged(tmp_path / "run") >= 5, process)
    os.kill(children(process)[1], signal.SIGKILL)
    err = process.communicate(timeout=200)[1].decode()
    if restarts == 0:
        assert process.returncode == 1, err
        return
    assert process.returncode == 0, err
    for key in ("train_loss", "val_loss"):
        ours, theirs = ([r[key] for r in read_log(d) if key in r] for d in (tmp_path / "run", undisturbed))
        np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def two_processes(tmp_path, commands, seconds=120):
    """Run a command as each rank, without torchrun; returns [(exit code, stderr)]."""
    port = random.randrange(20000, 32768)  # below those that the system gives to others meanwhile
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank, command in enumerate(commands):
        environment = os.environ | address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen([sys.executable, *command], cwd=tmp_path, env=environment, **pipes))
    return [(p.returncode, err.decode()) for p in processes for err in [p.communicate(timeout=seconds)[1]]]


def test_processes_that_differ_are_refused(flags, shards, tmp_path):
    command = [str(ROOT / "train_gpt2.py"), *flags, "--micro_batch_size=2", "--run_dir=run"]
    (tmp_path / "other").mkdir()
    for shard in shards.iterdir():
        content = bytearray(shard.read_bytes())
        content[-1000] ^= 1
        (tmp_path / "other" / shard.name).write_bytes(content)
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=lambda folder, names: {n for n in names if n.startswith(".") or n == "runs"})
    with open(copy / "model.py", "a") as file:
        file.write("# a later version\n")
    for other, words in (
        ([*command, "--learning_rate=0.5"], "configuration: learning_rate is 0.002 on process 0, 0.5 on process 1"),
        ([*command, f"--train_data={tmp_path / 'other'}"], "data: train_data"),
        ([str(copy / "train_gpt2.py"), *command[1:]], "program: version"),
    ):
        for code, err in two_processes(tmp_path, [command, other]):
            assert code == 2 and words in err and "Traceback" not in err, err
    assert not (tmp_path / "run").exists()


def test_processes_begin_with_the_weights_of_the_first(flags, tmp_path):
    """Though they draw others, as machines may."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train_gpt2
from model import GPT

models, init_weights = [], GPT.init_weights
def init_others(model, *args):
    init_weights(model, *args)
    models.append(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += SHIFT
GPT.init_weights = init_others
train_gpt2.main()
print("WEIGHTS", *(p.double().sum().item() for p in models[0].parameters()), file=sys.stderr)
"""
    arguments = [*flags, "--micro_batch_size=2", "--run_dir=run", "--max_steps=2", "--warmup_steps=1"]
    commands = [["-c", program.replace("SHIFT", shift), *arguments] for shift in ("0.0", "0.01")]
    found = []
    for code, err in two_processes(tmp_path, commands):
        assert code == 0, err
        found += [line for line in err.splitlines() if line.startswith("WEIGHTS")]
    assert len(found) == 2 and found[0] == found[1]


def test_nothing_holds_the_process_group_at_the_end(flags, tmp_path):
    """Or its threads may outlive Python, which aborts the process now and then."""
    program = f"""
import gc, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist, train_gpt2

gc.disable()
groups, init = [], dist.init_process_group
def noted(*args, **kwargs):
    init(*args, **kwargs)
    groups.append(dist.group.WORLD)
dist.init_process_group = noted
train_gpt2.main()
dist.destroy_process_group()
print("HELD", sys.getrefcount(groups.pop()), file=sys.stderr, flush=True)
os._exit(0)  # as the group is not there to be destroyed again
"""
    command = ["-c", program, *flags, "--micro_batch_size=2", "--run_dir=run", "--max_steps=2", "--warmup_steps=1"]
    for code, err in two_processes(tmp_path, [command] * 2):
        assert code == 0 and "HELD 1\n" in err, err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_wait_for_other_processes(start, flags, tmp_path, name):
    """Of which there is none."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = start("train_gpt2.py", *flags, "--run_dir=run", env=environment)
    wait_until(lambda: answers(port), process)
    process.send_signal(getattr(signal, name))
    assert process.wait(20) == -getattr(signal, name)


def answers(port):
    with socket.socket() as other:
        return other.connect_ex(("127.0.0.1", port)) == 0


def test_a_lost_process_is_said_in_a_line(flags, tmp_path):
    """Without torchrun, which ends the others itself."""
    command = [str(ROOT / "train_gpt2.py"), *flags, "--micro_batch_size=2", "--run_dir=run", "--max_steps=100000"]
    dying = f"""
import os, signal, sys
import cli, train_gpt2
train_gpt2.learning_rate = lambda config, step: os.kill(os.getpid(), signal.SIGKILL)
sys.path.insert(0, {str(ROOT)!r})
cli.run(train_gpt2.main)
"""
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        (code, err), (killed, _) = two_processes(tmp_path, [command, ["-c", dying, *command[1:]]])
    finally:
        del os.environ["PYTHONPATH"]
    assert killed == -signal.SIGKILL
    assert code == 1 and "process 0 lost the others" in err and "Traceback" not in err, err


# -----------------------------------------------------------------------------
# disks


def test_a_full_disk(start, flags, tmp_path, run):
    """Files may grow to 3 MB, less than a checkpoint: the run goes on without, and says so at its end."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))  # noqa: E731
    process = start("train_gpt2.py", *flags, "--run_dir=full", preexec_fn=limit)
    err = process.communicate()[1].decode()
    assert process.returncode == 1 and "Traceback" not in err, err
    assert "checkpoint_2: cannot be written (File too large)" in err and "Training goes on" in err
    assert err.strip().splitlines()[-1].startswith("error: full/checkpoint_8: cannot be written")
    assert steps_logged(tmp_path / "full") == 8
    assert [p.name for p in (tmp_path / "full").iterdir() if p.name.startswith("checkpoint")] == []


def test_the_log_finds_no_room(start, flags, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))  # noqa: E731
    process = start("train_gpt2.py", *flags, "--checkpoint_every=0", "--run_dir=full", preexec_fn=limit)
    err = process.communicate()[1].decode()
    assert process.returncode == 1 and "log.jsonl: cannot be written (File too large)" in err, err
    assert "Traceback" not in err


def test_folders_that_may_not_be_written(start, flags, tmp_path):
    """From the start: refused in a line. Later: the run goes on with the checkpoints it has, and says so at its end."""
    if os.getuid() == 0:  # whom no permission stops, but for the lack of two capabilities
        launch = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner", "--inh-caps=-all", sys.executable]
        if not shutil.which("setpriv"):
            pytest.skip("needs setpriv to give up what root may do")
    else:
        launch = [sys.executable]
    (tmp_path / "closed").mkdir(mode=0o555)
    command = [*launch, str(ROOT / "train_gpt2.py"), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    closed = [*command, f"--run_dir={tmp_path / 'closed' / 'run'}"]
    result = subprocess.run(closed, capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and "cannot be written (Permission denied)" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    run_dir = tmp_path / "open"
    later = [*command, "--max_steps=60", "--checkpoint_every=20", f"--run_dir={run_dir}"]
    process = subprocess.Popen(later, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    wait_until(lambda: (run_dir / "checkpoint_20").exists(), process)
    run_dir.chmod(0o555)
    err = process.communicate()[1].decode()
    assert process.returncode == 1 and "checkpoint_40: cannot be written (Permission denied)" in err, err
    assert "Traceback" not in err and err.splitlines()[-1].startswith(f"error: {run_dir}/checkpoint_60"), err
    assert list(checkpoints(run_dir)) == [20] and steps_logged(run_dir) == 60


def test_an_old_checkpoint_outlives_a_failed_write(tmp_path, monkeypatch):
    state = {"step": 1, "model": {"w": torch.ones(3)}}
    checkpoint.save(state, tmp_path, keep=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(Failure, match="checkpoint_2: cannot be written .No space left"):
        checkpoint.save(state | {"step": 2}, tmp_path, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_1"]


def test_a_checkpoint_that_cannot_be_deleted_costs_a_line(tmp_path, monkeypatch, capsys):
    for step in (1, 2):
        checkpoint.save({"step": step}, tmp_path)

    unlink = Path.unlink

    def unlink_others(path, **kwargs):
        if path.name == "checkpoint_1":
            raise PermissionError(1, "Operation not permitted")
        unlink(path, **kwargs)

    monkeypatch.setattr(Path, "unlink", unlink_others)
    checkpoint.save({"step": 3}, tmp_path, keep=1)
    assert f"{tmp_path}/checkpoint_1: cannot be deleted (Operation not permitted)\n" == capsys.readouterr().err
    assert list(checkpoints(tmp_path)) == [1, 3]


def test_a_deleted_run_folder(start, flags, tmp_path):
    process = start("train_gpt2.py", *flags, "--max_steps=40", "--run_dir=gone")
    wait_until(lambda: steps_logged(tmp_path / "gone") >= 5, process)
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    err = process.communicate()[1].decode()
    assert process.returncode == 0 and "log.jsonl is gone" in err, err
    assert max(checkpoints(tmp_path / "gone")) == 40


def test_a_damaged_checkpoint_is_passed_over(undisturbed, run, flags, tmp_path):
    """The newest is cut or has a bit flipped: named, and the run goes on from the one before."""
    draw = random.Random(0)
    for damage in ("cut", "flipped"):
        folder = tmp_path / damage
        shutil.copytree(undisturbed, folder)
        newest = folder / "checkpoint_12"
        content = bytearray(newest.read_bytes())
        if damage == "cut":
            del content[draw.randrange(len(content)) :]
        else:
            content[draw.randrange(len(content) // 2)] ^= 1 << draw.randrange(8)
        newest.write_bytes(content)
        code, _, err = run("train_gpt2.py", *flags, "--max_steps=12", f"--run_dir={folder}", "--resume=auto")
        assert code == 0 and f"{newest} is damaged: passed over" in err, err
        assert_same_run(folder, undisturbed)


def test_a_checkpoint_that_cannot_be_read_is_not_damaged(undisturbed, flags, tmp_path, monkeypatch, capsys):
    """A disk or a file server that fails for a while costs no checkpoint."""
    shutil.copytree(undisturbed, tmp_path / "run")
    before = checkpoints(tmp_path / "run")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("zipfile.ZipFile.testzip", fail)
    code, _, err = call(main, capsys, *flags, f"--run_dir={tmp_path / 'run'}", "--resume=auto")
    assert code == 2 and f"checkpoint_{max(before)}: cannot be read (Input/output error)" in err, err
    assert checkpoints(tmp_path / "run") == before


def test_no_checkpoint_is_sound(undisturbed, flags, tmp_path, capsys):
    """Then the run is not begun anew in their place."""
    shutil.copytree(undisturbed, tmp_path / "run")
    for path in (before := checkpoints(tmp_path / "run")).values():
        path.write_bytes(path.read_bytes()[:-1000])
    code, _, err = call(main, capsys, *flags, f"--run_dir={tmp_path / 'run'}", "--resume=auto")
    assert code == 2 and "no checkpoint is sound" in err, err
    assert checkpoints(tmp_path / "run") == before


def test_a_folder_is_one_process_alone(start, run, flags, tmp_path):
    command = ["train_gpt2.py", *flags, "--max_steps=100000", "--val_every=0", "--run_dir=run", "--resume=auto"]
    process = start(*command)
    wait_until(lambda: steps_logged(tmp_path / "run") >= 3, process)
    code, _, err = run(*command)
    assert code == 2 and "--run_dir run: another process is writing there" in err, err
    process.kill()
    process.communicate()
    done = steps_logged(tmp_path / "run")
    process = start(*command)  # now that nobody is there
    wait_until(lambda: steps_logged(tmp_path / "run") > done, process)
    process.kill()
    process.communicate()


def test_training_waits_for_the_copy_alone(tmp_path, monkeypatch):
    disk = threading.Event()
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: disk.wait(60))
    weights = torch.zeros(1000)
    writer = checkpoint.Writer(tmp_path, 0)
    writer.write(checkpoint.copied({"step": 1, "model": {"w": weights}, "lists": [{"x": weights, "n": 3}]}))
    assert not (tmp_path / "checkpoint_1").exists()
    weights += 1  # training goes on
    disk.set()
    writer.finish()
    state = torch.load(tmp_path / "checkpoint_1", weights_only=True)
    assert not state["model"]["w"].any() and not state["lists"][0]["x"].any() and state["lists"][0]["n"] == 3


# -----------------------------------------------------------------------------
# numbers


def planted(run_dir, what, flags, tmp_path):
    """A run in which NaN appears after three steps, in a gradient (once) or in a weight; (exit code, stderr)."""
    code = f"""
import torch
import cli, train_gpt2
steps = 0
clip = torch.nn.utils.clip_grad_norm_
def counted(parameters, limit):
    global steps
    steps += 1
    parameters = list(parameters)
    if steps == 4:
        ({{"gradient": parameters[3].grad, "weight": parameters[3].data}}["{what}"])[0] = float("nan")
    return clip(parameters, limit)
torch.nn.utils.clip_grad_norm_ = counted
cli.run(train_gpt2.main)
"""
    command = [sys.executable, "-c", code, *flags, f"--run_dir={run_dir}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    return result.returncode, result.stderr


def all_finite(path):
    return all(x.isfinite().all() for x in torch.load(path, weights_only=True)["model"].values())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_token_that_is_none_stops_the_run_with_what_it_has(run, flags, tmp_path, ranks):
    """A long shard looks sound at the start. Once it is mended, the run goes on as if nothing had been."""
    path = tmp_path / "long_train_0.bin"
    write_shard(path, np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint16))
    sound, stream = path.read_bytes(), TokenStream([path], 64, 257)
    order = BatchOrder(stream, 1337)
    i = next(i for i in range(16, 48) if 100 < order[i] < 200)  # what is far from its ends is not looked at
    step, offset = i // 4, 1024 + 2 * (64 * order[i] + 9)
    path.write_bytes(sound[:offset] + b"\xff\xff" + sound[offset + 2 :])
    command = ["train_gpt2.py", *flags, "--max_steps=12", "--checkpoint_every=0", f"--train_data={path}"]
    command += [f"--micro_batch_size={4 // ranks}", "--resume=auto"]
    code, _, err = run(*command, "--run_dir=run", ranks=ranks)
    assert code == (2 if ranks == 1 else 1), err  # torchrun's exit code is always 1
    assert f"{path}: token id 65535" in err and f"stopped by an error after step {step}" in err, err
    assert 'train_gpt2.py", line' not in err, err  # torchrun adds a traceback of its own
    assert list(checkpoints(tmp_path / "run")) == [step] and steps_logged(tmp_path / "run") == step
    path.write_bytes(sound)
    for name in ("run", "undamaged"):
        code, _, err = run(*command, f"--run_dir={name}", ranks=ranks)
        assert code == 0, err
    assert_same_run(tmp_path / "run", tmp_path / "undamaged")


def test_nan_in_a_gradient_costs_a_step(flags, tmp_path):
    code, err = planted(tmp_path / "nan", "gradient", flags, tmp_path)
    assert code == 0 and "step 4 skipped" in err and "1 steps skipped" in err, err
    records = [r for r in read_log(tmp_path / "nan") if "train_loss" in r]
    assert [r["step"] for r in records if r.get("skipped")] == [4] and records[3]["grad_norm"] is None
    assert all(all_finite(path) for path in checkpoints(tmp_path / "nan").values())


def test_nan_in_a_weight_is_never_saved(flags, tmp_path):
    code, err = planted(tmp_path / "nan", "weight", [*flags, "--max_steps=30"], tmp_path)
    assert code == 1 and "Traceback" not in err, err
    assert "not finite" in err.splitlines()[-1]
    found = checkpoints(tmp_path / "nan")
    assert found and all(all_finite(path) for path in found.values())


def test_outliers_are_flagged():
    """As llm.c: the z-score of a value among the last 128, itself included."""
    from collections import deque

    draw = np.random.default_rng(0)
    values = [*draw.normal(3, 0.1, size=200), 9.0, math.nan, *draw.normal(3, 0.1, size=5)]
    recent, zs = deque(maxlen=128), []
    for value in values:
        zs.append(z_score(recent, value))
    assert zs[:127] == [0.0] * 127
    window = np.array(values[73:201])
    assert zs[200] == pytest.approx((9.0 - window.mean()) / window.std()) and zs[200] > 5
    assert zs[201] == 0 and max(zs[:200]) < 5


# -----------------------------------------------------------------------------
# long


def test_the_data_position_does_not_drift(shards):
    """The batch of any step is that of a loader that starts there."""
    stream = TokenStream(sorted(shards.glob("*_train_*")), 64, 257)
    batches = training_batches(stream, 7, 0, 4, torch.device("cpu"))
    for step in range(200):
        inputs, targets = next(batches)
        if step % 37 == 0:
            fresh_inputs, fresh_targets = next(training_batches(stream, 7, 4 * step, 4, torch.device("cpu")))
            assert torch.equal(inputs, fresh_inputs) and torch.equal(targets, fresh_targets)


@linux
@pytest.mark.slow
def test_soak(start, flags, tmp_path):
    """Memory and file descriptors stay flat, and the log's positions are those of the steps."""
    minutes = float(os.environ.get("SOAK_MINUTES", 2))
    often = ["--max_steps=10000000", "--val_every=20", "--checkpoint_every=20", "--sample_every=100", "--run_dir=soak"]
    with open(tmp_path / "output", "wb") as output:
        process = start("train_gpt2.py", *flags, *often, stdout=output, stderr=output)
        wait_until(lambda: steps_logged(tmp_path / "soak") >= 200, process, 600)
        samples, end = [], time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory = int(re.search(r"VmRSS:\s+(\d+)", status)[1])
            samples.append((memory, len(list(Path(f"/proc/{process.pid}/fd").iterdir()))))
            time.sleep(min(5, minutes))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    third = len(samples) // 3
    early, late = (np.array(samples[a:b]) for a, b in ((0, third), (2 * third, None)))
    (memory, later_memory), (files, later_files) = zip(early.mean(0), late.mean(0), strict=True)
    print(f"{memory:.0f} -> {later_memory:.0f} kB resident, {files:.1f} -> {later_files:.1f} open files")
    assert later_memory < 1.02 * memory and later_files < files + 1
    records = [json.loads(line) for line in (tmp_path / "soak" / "log.jsonl").read_text().splitlines()]
    training = [r for r in records if "train_loss" in r]
    assert [r["tokens"] for r in training] == [256 * (i + 1) for i in range(len(training))]
