"""The download of FineWeb, in processes of its own, from a hub that runs on this machine.

python -m pytest tests/test_fineweb.py
"""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import ROOT

from cli import UserError
from data import fineweb
from data.shards import open_shard, write_shard


class Hub(ThreadingHTTPServer):
    """What the Hugging Face hub answers for the files of one repository, and how it can fail."""

    daemon_threads = True

    def __init__(self, repository, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.prefix, self.files = f"/datasets/{repository}/resolve/main/", dict(files)
        self.requests = []  # (method, file) in the order they came
        self.errors = {}  # (method, file) -> status codes to answer first
        self.stalls = set()  # files whose first half comes, and then nothing
        self.cuts = {}  # file -> how often the connection breaks in its middle


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        hub, name = self.server, self.path.removeprefix(self.server.prefix)
        hub.requests.append((self.command, name))
        error = hub.errors.get((self.command, name))
        if error or name not in hub.files:
            self.send_response(error.pop(0) if error else 404)
            if not error:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = hub.files[name]
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0123456789" * 4)
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        half = (first + len(content)) // 2
        if name in hub.stalls:
            self.wfile.write(content[first:half])
            time.sleep(60)
        elif hub.cuts.get(name):
            hub.cuts[name] -= 1
            self.wfile.write(content[first:half])
            self.close_connection = True
        else:
            self.wfile.write(content[first:])

    def log_message(self, *args):
        pass


VAL, *TRAIN = NAMES = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in (1, 2, 3)]


@pytest.fixture
def hub(tmp_path):
    tokens = np.arange(50000, dtype=np.uint16)
    for i, name in enumerate(NAMES):
        write_shard(tmp_path / name, tokens[i:])
    hub = Hub("kjj0/fineweb10B-gpt2", {name: (tmp_path / name).read_bytes() for name in NAMES})
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def start(hub, tmp_path):
    def popen(*args, **kwargs):
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        (tmp_path / "work").mkdir(exist_ok=True)
        command = [sys.executable, "-m", "data.fineweb", *args]
        return subprocess.Popen(
            command, cwd=tmp_path / "work", env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, **kwargs
        )

    return popen


@pytest.fixture
def run(start):
    def finish(*args, **kwargs):
        process = start(*args, **kwargs)
        out, err = process.communicate(timeout=100)
        return process.returncode, err.decode()

    return finish


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "work" / "data" / "fineweb10B"


def present(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_every_shard_comes_once(hub, run, folder):
    code, err = run("--shards", "2")
    assert code == 0, err
    assert present(folder) == sorted([VAL, *TRAIN[:2]])
    assert all((folder / name).read_bytes() == hub.files[name] for name in present(folder))
    assert "MB" in err and "ETA" in err and "Traceback" not in err
    del hub.requests[:]
    (folder / VAL).write_bytes(hub.files[VAL][:-2])  # damaged since: the only one to come again
    code, err = run("--shards", "3")
    assert code == 0 and f"{VAL}: the header promises" in err
    assert [name for method, name in hub.requests if method == "GET"] == [VAL, TRAIN[2]]
    del hub.requests[:]
    assert run("--shards", "3")[0] == 0 and hub.requests == []


def test_a_killed_download_goes_on(hub, run, start, folder):
    hub.stalls.add(TRAIN[1])
    process = start("--shards", "3")
    while ("GET", TRAIN[1]) not in hub.requests:
        time.sleep(0.02)
    time.sleep(0.3)
    code, err = run("--shards", "3")
    assert code == 2 and "another process" in err
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert present(folder) == sorted([VAL, TRAIN[0]])  # usable, and nothing that only looks whole
    assert all(len(open_shard(folder / name)) for name in present(folder))
    hub.stalls.clear(), hub.requests.clear()
    code, err = run("--shards", "3")
    assert code == 0, err
    assert {name for _, name in hub.requests} == set(TRAIN[1:])
    assert all((folder / name).read_bytes() == hub.files[name] for name in NAMES)
    assert not (folder / ".download").exists()


def test_a_file_that_the_hub_has_cut_short_gets_no_name(hub, run, folder):
    whole, hub.files[TRAIN[0]] = hub.files[TRAIN[0]], hub.files[TRAIN[0]][:-1000]
    code, err = run("--shards", "1")
    assert code == 1 and TRAIN[0] in err.splitlines()[-1] and "promises" in err
    assert present(folder) == [VAL]
    hub.files[TRAIN[0]] = whole
    assert run("--shards", "1")[0] == 0 and present(folder) == sorted([VAL, TRAIN[0]])


def test_broken_connections_and_server_errors_are_tried_again(hub, run, folder):
    hub.cuts[VAL] = 1
    hub.errors["GET", TRAIN[0]] = [500]
    hub.errors["HEAD", TRAIN[1]] = [503]
    code, err = run("--shards", "2")
    assert code == 0, err
    assert all((folder / name).read_bytes() == hub.files[name] for name in [VAL, *TRAIN[:2]])


def test_a_full_disk_is_one_line(run, folder):
    """The limit on the size of a file stands for the end of the disk."""
    limit = (50_000, resource.RLIM_INFINITY)
    code, err = run("--shards", "0", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert code == 1 and f"{VAL}: cannot be written" in err.splitlines()[-1], err
    assert present(folder) == []


def test_what_the_hub_does_not_have_is_one_line(hub, run, folder):
    del hub.files[TRAIN[1]]
    code, err = run("--shards", "3")
    assert code == 1 and TRAIN[1] in err.splitlines()[-1] and "404" in err and "Traceback" not in err
    assert present(folder) == sorted([VAL, TRAIN[0]])


@pytest.mark.parametrize("wrong", [["--shards", "104"], ["--shards", "-1"], ["--shards", "x"], ["--shard", "1"]])
def test_wrong_flags_are_refused(wrong):
    with pytest.raises(UserError, match="--shards"):
        fineweb.main(wrong)
