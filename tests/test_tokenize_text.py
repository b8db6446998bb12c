"""A user's own text into shards: what is read, interruptions, full disks, bad input.

python -m pytest tests/test_tokenize_text.py
"""

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import conftest
import numpy as np
import pytest
import zstandard
from conftest import ROOT

from cli import UserError
from data import tokenize_text
from data.shards import open_shard
from data.tokenizer import encode_documents, load_tokenizer

COMMAND = [sys.executable, "-m", "data.tokenize_text"]


def call(capsys, *args):
    """The command in this process, with bytes as tokens: exit code and stderr."""
    return conftest.call(tokenize_text.main, capsys, "--tokenizer=bytes", *args)[::2]


def start(*args, **kwargs):
    """The command in a process of its own, with bytes as tokens."""
    command = [*COMMAND, "--tokenizer=bytes", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, **kwargs)


def tokens(folder, split="train"):
    return np.concatenate([open_shard(path) for path in sorted(folder.glob(f"*_{split}_*.bin"))]).tolist()


def expected(*texts):
    return [token for text in texts for token in [256, *text.encode()]]


STORY = "  Once <|endoftext|> upon\r\n\r\na time,\tnaïve 日本\u2028語.\n\n" * 40


@pytest.fixture
def texts(tmp_path):
    """A folder with every kind of file; returns it and the documents in their order."""
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    lines = [json.dumps({"text": text, "n": i}) for i, text in enumerate(["one\n", "", " two ", STORY, "\U0001f642"])]
    (folder / "a.txt").write_bytes(STORY.encode())
    (folder / "b" / "empty.txt").write_bytes(b"")
    (folder / "b" / "lines.jsonl").write_bytes("\n".join(lines).encode())
    (folder / "c.md.gz").write_bytes(gzip.compress(b"# title\n") + gzip.compress(b"second member"))
    zst = zstandard.ZstdCompressor()
    (folder / "d.jsonl.zst").write_bytes(zst.compress((lines[0] + "\r\n\n").encode()) + zst.compress(lines[2].encode()))
    (folder / "e.csv").write_text("not read")
    (folder / "f.txt").write_bytes("\ufeffmarked".encode())
    documents = [STORY, "one\n", "", " two ", STORY, "\U0001f642", "# title\nsecond member", "one\n", " two ", "marked"]
    return folder, documents


@pytest.mark.parametrize("block", [16, 2**20])
def test_every_document_is_there_unchanged(texts, tmp_path, capsys, monkeypatch, block):
    monkeypatch.setattr(tokenize_text, "BLOCK", block)
    folder, documents = texts
    outs = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        code, err = call(capsys, folder, "--out", out, "--shard_tokens", 1000, "--workers", workers)
        assert code == 0 and "empty.txt: no text" in err and f"{len(documents)} documents" in err
        assert "MB/s" in err and "ETA" in err
        assert tokens(out) == expected(*documents)
        sizes = [len(open_shard(path)) for path in sorted(out.glob("*.bin"))]
        assert set(sizes[:-1]) == {1000} and 0 < sizes[-1] <= 1000  # STORY is longer than a shard
        outs.append([path.read_bytes() for path in sorted(out.glob("*.bin"))])
    assert outs[0] == outs[1]


def test_inputs_come_in_the_order_named_and_once(texts, tmp_path, capsys):
    folder, _ = texts
    inputs = [folder / "c.md.gz", str(folder / "**" / "*.jsonl"), folder / "c.md.gz"]
    assert call(capsys, *inputs, "--out", tmp_path / "out", "--field", "text")[0] == 0
    documents = ["# title\nsecond member", "one\n", "", " two ", STORY, "\U0001f642"]
    assert tokens(tmp_path / "out") == expected(*documents)


def test_folders_are_read_by_way_of_links(texts, tmp_path, capsys):
    """Each file once, though links go in circles."""
    folder, documents = texts
    (tmp_path / "links").mkdir()
    for name in ("one", "two"):
        (tmp_path / "links" / name).symlink_to(folder)
    (folder / "b" / "back").symlink_to(tmp_path)
    assert call(capsys, tmp_path / "links", "--out", tmp_path / "out")[0] == 0
    assert tokens(tmp_path / "out") == expected(*documents)


def test_a_folder_that_cannot_be_read_is_not_passed_over(texts, tmp_path, capsys, monkeypatch):
    folder, _ = texts
    scandir = os.scandir

    def scan(path):
        if str(path) == str(folder / "b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    code, err = call(capsys, folder, "--out", tmp_path / "out")
    assert code == 2 and f"{folder / 'b'}: cannot be read (Permission denied)" in err, err


def test_parquet(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    documents = [f"row {i} é" * (i % 3) for i in range(500)]
    write_table(pyarrow.table({"body": documents}), tmp_path / "a.parquet", row_group_size=100)
    assert call(capsys, tmp_path / "a.parquet", "--out", tmp_path / "out", "--field", "body")[0] == 0
    assert tokens(tmp_path / "out") == expected(*documents)
    code, err = call(capsys, tmp_path / "a.parquet", "--out", tmp_path / "other")
    assert code == 2 and "a.parquet" in err and "body" in err


@pytest.mark.parametrize("val_tokens", [1, 12, 13, 14, 60])
def test_validation_takes_whole_documents_from_the_start(tmp_path, capsys, val_tokens):
    documents = [f"document {i:02d}" for i in range(20)]  # 12 tokens each with their first
    lines = "\n".join(json.dumps({"text": text}) for text in documents)
    (tmp_path / "a.jsonl").write_text(lines)
    assert call(capsys, tmp_path / "a.jsonl", "--out", tmp_path / "out", "--val_tokens", val_tokens)[0] == 0
    n = -(-val_tokens // 12)
    assert tokens(tmp_path / "out", "val") == expected(*documents[:n])
    assert tokens(tmp_path / "out") == expected(*documents[n:])


def test_gpt2_tokens_do_not_depend_on_where_text_is_cut(monkeypatch):
    try:
        gpt2 = load_tokenizer("gpt2")
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(tokenize_text, "BLOCK", 7)
    parts = ["a", "bc", "'s", "'", " ", "  ", "\n", "\n\n", "\t", "\r\n", "12", ".", "é", "中", "\u3000", "\u00a0"]
    parts += ["\u2028", "\x1c", "\x85", "🙂", "<|endoftext|>", "don't", "\u0301", "\x00"]
    rng = random.Random(0)
    for _ in range(2000):
        chunks = ["".join(rng.choices(parts, k=rng.randint(1, 8))) for _ in range(rng.randint(1, 6))]
        pieces = list(tokenize_text.pieces("x", chunks))
        expected = [50256, *gpt2.encode_ordinary("".join(chunks))]
        assert encode_documents(gpt2, 50256, pieces).tolist() == expected, chunks
        for n in range(1, len(pieces)):  # and not on what is encoded together
            apart = [encode_documents(gpt2, 50256, part) for part in (pieces[:n], pieces[n:])]
            assert np.concatenate(apart).tolist() == expected, chunks
    pieces = [(True, "a <|endof"), (True, "text|>"), (True, ""), (True, "a\ud800b"), (True, "\udc00")]  # JSON can
    expected = [token for _, text in pieces for token in (50256, *gpt2.encode_ordinary(text))]
    assert encode_documents(gpt2, 50256, pieces).tolist() == expected


def test_a_killed_run_goes_on(tmp_path, capsys):
    text = random.Random(1).randbytes(12_000_000).hex(" ").encode()
    (tmp_path / "a.txt").write_bytes(text[:20_000_000])
    (tmp_path / "b.txt").write_bytes(text[20_000_000:])
    args = [tmp_path / "a.txt", tmp_path / "b.txt", "--shard_tokens", 1_000_000]
    process = start(*args, "--out", tmp_path / "out")
    third = tmp_path / "out" / "text_train_000003.bin"
    while not third.exists() and process.poll() is None:
        time.sleep(0.001)
    code, err = call(capsys, *args, "--out", tmp_path / "out")
    assert code == 2 and "another process" in err
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = sorted(third.parent.glob("*.bin"))
    assert 3 <= len(done) < 36 and {len(open_shard(path)) for path in done} == {1_000_000}
    second = third.with_name("text_train_000002.bin")  # the third one may be younger than the note of it
    written = second.stat().st_mtime_ns
    code, err = call(capsys, *args, "--out", tmp_path / "out")
    assert code == 0 and "going on after" in err and second.stat().st_mtime_ns == written
    got = np.concatenate([open_shard(path) for path in sorted(third.parent.glob("*.bin"))])
    assert got[0] == got[20_000_001] == 256 and np.delete(got, [0, 20_000_001]).astype(np.uint8).tobytes() == text
    assert not list(third.parent.glob("*.tmp"))
    code, err = call(capsys, *args, "--out", tmp_path / "out")
    assert code == 0 and "is finished" in err and second.stat().st_mtime_ns == written
    third.write_bytes(third.read_bytes()[:-1])
    code, err = call(capsys, *args, "--out", tmp_path / "out")
    assert code == 0 and "text_train_000003.bin" in err and len(open_shard(third)) == 1_000_000
    code, err = call(capsys, *args, "--out", tmp_path / "out", "--val_tokens", 5)
    assert code == 2 and "val_tokens" in err


def test_a_full_disk_is_one_line_and_the_rest_is_made_later(texts, tmp_path, capsys):
    """The limit on the size of a file stands for the end of the disk."""
    (tmp_path / "a.txt").write_text("word " * 600_000)
    args = [tmp_path / "a.txt", "--out", tmp_path / "out"]
    limit = (2_000_000, resource.RLIM_INFINITY)
    process = start(*args, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    _, err = process.communicate()
    lines = err.decode().splitlines()
    assert process.returncode == 1 and "text_train_000001.bin: cannot be written" in lines[-1], err
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {".lock", "text.json"}
    assert call(capsys, *args)[0] == 0
    assert tokens(tmp_path / "out") == expected("word " * 600_000)


def test_memory_does_not_grow_with_the_input(tmp_path):
    """Not with a long document, nor with what is packed well."""
    words, peaks = b"some words " * 90_909, []
    (tmp_path / "a.txt").write_bytes(words)
    with open(tmp_path / "b.txt", "wb") as file:
        file.writelines(words for _ in range(100))
    (tmp_path / "c.txt.zst").write_bytes(zstandard.compress(words * 100))
    for name in ("a.txt", "b.txt", "c.txt.zst"):
        process = start(tmp_path / name, "--out", tmp_path / f"out_{name}", "--workers", 2)
        _, status, usage = os.wait4(process.pid, 0)
        process.stderr.close()
        assert status == 0
        peaks.append(usage.ru_maxrss / 1024)
    assert max(peaks[1:]) - peaks[0] < 70, peaks  # MiB; the text has 95, its tokens 190


BAD = {
    "latin1.txt": (b"caf\xe9 au lait", "byte 3 is not UTF-8"),
    "cut.txt": ("café".encode()[:-1], "ends within a character"),
    "cut.txt.gz": (gzip.compress(STORY.encode())[:-9], "cannot be read"),
    "bad.txt.gz": (b"no gzip at all", "cannot be read"),
    "cut.md.zst": (zstandard.compress(STORY.encode())[:-9], "ends too early"),
    "bad.md.zst": (b"no zstandard at all", "cannot be read"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
    "field.jsonl": (b'{"text": "a"}\n\n{"body": "b"}', "line 3 has no 'text'"),
    "list.jsonl": (b"[1, 2]", "line 1 has no 'text'"),
    "number.jsonl": (b'{"text": 3}', "line 1: 'text' is not text"),
    "empty.txt": (b"", "no text in all"),
    "word.txt": (b"a" * (2**24 + 2), "no word ends"),
    "gap.jsonl": (b'{"text": "a"}\n{"text": "b' + b" " * (2**19 - 1) + b'c"}', "spaces or line ends in a row"),
    "line.jsonl": (b'{"text": "' + b"a " * 2**25 + b'"}', "line 1 has over"),
    "table.csv": (b"a,b", "read are .txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(tmp_path, capsys, name):
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    code, err = call(capsys, tmp_path / name, "--out", tmp_path / "out")
    last = err.splitlines()[-1]
    assert code == 2 and name in last and words in last, err
    assert not list(tmp_path.glob("out/*.bin*"))


def test_wrong_flags_are_refused_in_one_line(texts, tmp_path, capsys):
    folder, _ = texts
    for wrong, word in (
        (["--shard_tokens", 999], "--shard_tokens"),
        (["--val_tokens", -1], "--val_tokens"),
        (["--workers", 0], "--workers"),
        (["--tokenizer", "gpt3"], "--tokenizer"),
        (["--val_token", 1], "did you mean '--val_tokens'"),
        (["nowhere/*.txt"], "nowhere/*.txt"),
    ):
        code, err = call(capsys, folder, "--out", tmp_path / "out", *wrong)
        assert code == 2 and word in err and err.count("\n") == 1
    code, err = call(capsys, folder, "--out", tmp_path / "out", "--val_tokens", 10**6)
    assert code == 2 and "nothing is left to train on" in err and not list(tmp_path.glob("out/*.bin*"))
    code, err = call(capsys, folder, "--out", folder / "a.txt")
    assert code == 2 and "a.txt: cannot be written" in err
    for number, foreign in enumerate(('{"chapter": 1}', "[1, 2]", '{"job": null, "shards": []}')):
        (tmp_path / f"foreign{number}").mkdir()
        (tmp_path / f"foreign{number}" / "text.json").write_text(foreign)
        code, err = call(capsys, folder, "--out", tmp_path / f"foreign{number}")
        assert code == 2 and f"foreign{number}/text.json: cannot be read" in err and err.count("\n") == 1, err
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "x_train_000001.bin").touch()
    code, err = call(capsys, folder, "--out", tmp_path / "others")
    assert code == 2 and "holds shards already" in err
