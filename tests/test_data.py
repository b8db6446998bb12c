"""Shards, the batch order and the tokenizers.

python -m pytest tests/test_data.py
"""

import json
import os

import numpy as np
import pytest
import torch
from conftest import read_log

import cli
import data.python_stdlib
import evaluate
import train_gpt2
from cli import Failure, UserError
from data import inspect_shards
from data.python_stdlib import make_shards
from data.shards import BatchOrder, TokenStream, find_shards, open_shard, training_batches, write_shard
from data.tokenizer import decode, load_tokenizer

CPU = torch.device("cpu")


def numbered(folder, sizes, split="train"):
    """Shards whose tokens count on from 0, so that a token tells its place in the stream."""
    tokens = np.arange(sum(sizes), dtype=np.uint16)
    for i, part in enumerate(np.split(tokens, np.cumsum(sizes)[:-1])):
        write_shard(folder / f"x_{split}_{i:06d}.bin", part)
    return find_shards(str(folder), split, "train_data")


def test_shard_is_llm_c_format(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([5, 65535, 0], dtype=np.uint16))
    raw = (tmp_path / "a.bin").read_bytes()
    assert len(raw) == 1024 + 6
    assert np.frombuffer(raw[:1024], "<i4")[:4].tolist() == [20240520, 1, 3, 0]
    assert open_shard(tmp_path / "a.bin").tolist() == [5, 65535, 0]


def test_npy_shards_are_read(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1, 2, 3], dtype=np.uint16))
    assert open_shard(tmp_path / "a.npy").tolist() == [1, 2, 3]
    np.save(tmp_path / "b.npy", np.array([1, 2, 3], dtype=np.int32))
    (tmp_path / "c.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-2])
    np.save(tmp_path / "d.npy", np.array([], dtype=np.uint16))
    for name in ("b.npy", "c.npy", "d.npy"):
        with pytest.raises(UserError, match=name):
            open_shard(tmp_path / name)


def test_nanogpt_shards_are_read_when_asked_for(tmp_path):
    """Without a header nothing tells them from other files, and a file that has one is not theirs."""
    np.array([50256, 1, 2], dtype="<u2").tofile(tmp_path / "train.bin")
    assert open_shard(tmp_path / "train.bin", "nanogpt").tolist() == [50256, 1, 2]
    with pytest.raises(UserError, match="train.bin: .*less than a shard's header"):
        open_shard(tmp_path / "train.bin")
    np.zeros(1000, dtype="<u2").tofile(tmp_path / "long.bin")
    with pytest.raises(UserError, match="long.bin: .*--shard_format nanogpt"):
        open_shard(tmp_path / "long.bin")
    write_shard(tmp_path / "llmc.bin", np.zeros(5, dtype=np.uint16))
    (tmp_path / "odd.bin").write_bytes(b"odd")
    (tmp_path / "empty.bin").touch()
    for name, words in (("llmc.bin", "--shard_format auto"), ("odd.bin", "3 bytes"), ("empty.bin", "0 bytes")):
        with pytest.raises(UserError, match=f"{name}: .*{words}"):
            open_shard(tmp_path / name, "nanogpt")
    np.save(tmp_path / "a.npy", np.array([1, 2], dtype=np.uint16))
    assert open_shard(tmp_path / "a.npy", "nanogpt").tolist() == [1, 2]


def test_training_and_evaluation_read_nanogpt_shards(flags, shards, tmp_path, capsys):
    train, val = (np.concatenate([open_shard(p) for p in find_shards(str(shards), s, "f")]) for s in ("train", "val"))
    train.tofile(tmp_path / "train.bin"), val.tofile(tmp_path / "val.bin")
    write_shard(tmp_path / "one_train_1.bin", train)
    args = [*flags, "--attention=softmax", f"--run_dir={tmp_path / 'run'}"]
    files = [f"--train_data={tmp_path / 'train.bin'}", f"--val_data={tmp_path / 'val.bin'}", "--shard_format=nanogpt"]
    train_gpt2.main([*args, *files, "--max_steps=4"])
    logged = read_log(tmp_path / "run")[-1]["val_loss"]
    evaluate.main(["--run_dir", str(tmp_path / "run"), "--json"])
    as_llmc = ["--val_data", str(shards), "--shard_format", "auto"]
    evaluate.main(["--run_dir", str(tmp_path / "run"), "--json", *as_llmc])
    losses = [json.loads(line)["val_loss"] for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]
    assert losses == [pytest.approx(logged, rel=1e-6)] * 2
    # the same tokens in another format are the same data
    train_gpt2.main([*args, f"--train_data={tmp_path / 'one_train_1.bin'}", "--resume=auto", "--max_steps=5"])


def inspect(capsys, *args):
    """inspect_shards in this process: exit code, stdout, stderr."""
    try:
        cli.run(lambda: inspect_shards.main(list(map(str, args))))
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_inspect_shards(tmp_path, capsys):
    write_shard(tmp_path / "x_train_1.bin", np.array([256, *b"naive", 256, *b"text"], dtype=np.uint16))
    write_shard(tmp_path / "x_val_0.bin", np.array([256, *b"held out"], dtype=np.uint16))
    code, out, err = inspect(capsys, tmp_path)  # whose ids say that they are bytes
    assert code == 0 and "x_train_1.bin: 11 tokens, 2 documents" in out and "x_val_0.bin: 9 tokens, 1 doc" in out
    assert "2 shards: 20 tokens, 3 documents" in out and "<|endoftext|>naive<|endoftext|>text" in out
    (tmp_path / "x_val_0.bin").write_bytes((tmp_path / "x_val_0.bin").read_bytes()[:-1])
    write_shard(tmp_path / "x_val_1.bin", np.array([256, 300], dtype=np.uint16))
    code, out, err = inspect(capsys, tmp_path / "*.bin", "--tokenizer=bytes")
    assert code == 2 and "2 of 3 shards are bad" in err
    assert "x_val_0.bin: the header promises" in out and "x_val_1.bin: token 1 is 300" in out and "1 shards: 11" in out
    np.array([256, *b"hello"], dtype="<u2").tofile(tmp_path / "train.bin")
    args = [tmp_path / "train.bin", "--tokenizer=bytes", "--shard_format=nanogpt"]
    assert "train.bin: 6 tokens, 1 documents" in inspect(capsys, *args)[1]
    for wrong in ("--shard_format=nanogtp", "--tokenizer=x"):
        code, _, err = inspect(capsys, tmp_path, wrong)
        assert code == 2 and err.count("\n") == 1
    code, _, err = inspect(capsys, tmp_path / "nowhere*")
    assert code == 2 and "nowhere" in err and err.count("\n") == 1


@pytest.mark.parametrize("damage", ["cut", "cut header", "empty", "magic", "version", "longer", "no tokens"])
def test_damaged_shards_are_refused_by_name(tmp_path, damage):
    path = tmp_path / "x_train_000001.bin"
    write_shard(path, np.arange(1000, dtype=np.uint16))
    raw = path.read_bytes()
    header = np.frombuffer(raw[:1024], "<i4").copy()
    if damage in ("magic", "version", "no tokens"):
        header[{"magic": 0, "version": 1, "no tokens": 2}[damage]] = {"magic": 1, "version": 2, "no tokens": 0}[damage]
    body = b"" if damage == "no tokens" else raw[1024:]
    cuts = {"cut": raw[:-2], "cut header": raw[:100], "empty": b"", "longer": raw + b"\0\0"}
    path.write_bytes(cuts.get(damage, header.tobytes() + body))
    with pytest.raises(UserError, match="x_train_000001.bin"):
        open_shard(path)


def test_find_shards(tmp_path):
    for name in ("b_train_1.bin", "a_train_2.npy", "a_val_0.bin", "notes_train_.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in find_shards(str(tmp_path), "train", "f")] == ["a_train_2.npy", "b_train_1.bin"]
    assert [p.name for p in find_shards(str(tmp_path), "val", "f")] == ["a_val_0.bin"]
    assert [p.name for p in find_shards(str(tmp_path / "*_val_*"), "train", "f")] == ["a_val_0.bin"]
    assert [p.name for p in find_shards(str(tmp_path / "a_val_0.bin"), "train", "f")] == ["a_val_0.bin"]
    for nothing in ("*.gz", "nowhere", "nowhere/x.bin"):
        with pytest.raises(UserError, match="val_data: no file matches"):
            find_shards(str(tmp_path / nothing), "val", "val_data")


@pytest.mark.parametrize("sizes", [[1000], [333, 5, 1, 661], [7, 7, 7, 979], [64, 64, 872]])
@pytest.mark.parametrize("T", [1, 7, 64])
def test_an_epoch_visits_every_window_once(tmp_path, sizes, T):
    stream = TokenStream(numbered(tmp_path, sizes), T, 65536)
    assert stream.windows == 999 // T  # only the last incomplete sequence is dropped
    order = BatchOrder(stream, seed=3)
    for epoch in range(3):
        seen = [order[epoch * stream.windows + i] for i in range(stream.windows)]
        assert sorted(seen) == list(range(stream.windows))
        assert all(stream.window(w).tolist() == list(range(w * T, w * T + T + 1)) for w in seen[:20])
    assert T > 1 or [order[i] for i in range(999)] != [order[999 + i] for i in range(999)]  # another order


def test_an_epoch_reads_one_shard_after_the_other(tmp_path):
    stream = TokenStream(numbered(tmp_path, [640, 640, 640, 640]), 64, 65536)
    order = BatchOrder(stream, seed=0)
    shards = [order[i] // 10 for i in range(stream.windows)]
    assert sum(a != b for a, b in zip(shards, shards[1:], strict=False)) == 3


@pytest.mark.parametrize("world_size, micro_batch_size", [(1, 3), (2, 3), (2, 1), (3, 2)])
def test_ranks_and_micro_batches_only_slice_the_same_batches(tmp_path, world_size, micro_batch_size):
    stream = TokenStream(numbered(tmp_path, [500, 700]), 11, 65536)
    order, batch_size, first_step = BatchOrder(stream, 9), 6, 17
    expected = [order[i] for i in range(first_step * batch_size, (first_step + 3) * batch_size)]
    ranks = [
        training_batches(stream, 9, first_step * batch_size, micro_batch_size, CPU, rank, world_size)
        for rank in range(world_size)
    ]
    for step in range(3):
        got = []
        for _ in range(batch_size // world_size // micro_batch_size):
            for batches in ranks:
                inputs, targets = next(batches)
                assert inputs.shape == targets.shape == (micro_batch_size, 11)
                assert (targets == inputs + 1).all()
                got += (inputs[:, 0] // 11).tolist()
        assert sorted(got) == sorted(expected[step * batch_size : (step + 1) * batch_size])


def test_order_is_the_same_on_every_machine(tmp_path):
    order = BatchOrder(TokenStream(numbered(tmp_path, [500, 700]), 64, 65536), 1337)
    assert [order[i] for i in range(18)] == [12, 17, 8, 16, 9, 15, 11, 10, 14, 13, 5, 1, 6, 7, 4, 0, 2, 3]


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    stream = TokenStream(numbered(tmp_path, [1000]), 100, 257)
    with pytest.raises(UserError, match="x_train_000000.bin: token id .* 257 ids"):
        stream.batch([2])


def test_a_shard_cut_while_it_is_read_is_refused(tmp_path):
    """Where memory is mapped beyond the end of a file, reading kills the process."""
    paths = numbered(tmp_path, [5000, 50_000])
    stream = TokenStream(paths, 64, 65536)
    expected, whole = stream.window(700).tolist(), paths[1].read_bytes()
    os.truncate(paths[1], 30_000)
    assert stream.window(0).tolist() == list(range(65))
    with pytest.raises(UserError, match=f"{paths[1]}: was cut while it was being read"):
        stream.window(700)
    with open(paths[1], "r+b") as file:
        file.write(whole)
    assert stream.window(700).tolist() == expected


def test_too_few_tokens_are_refused(tmp_path):
    with pytest.raises(UserError, match="x_train_000000.bin: 64 tokens in all"):
        TokenStream(numbered(tmp_path, [60, 4]), 64, 65536)


def test_fingerprint_follows_the_tokens_not_the_path(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    a = TokenStream(numbered(tmp_path / "a", [500, 700]), 64, 65536).fingerprint()
    assert a == TokenStream(numbered(tmp_path / "b", [500, 700]), 64, 65536).fingerprint()
    assert a != TokenStream(numbered(tmp_path / "b", [700, 500]), 64, 65536).fingerprint()


def test_stdlib_shards(tmp_path, monkeypatch):
    def write_nothing(path, tokens):
        raise Failure(f"{path}: cannot be written (No space left on device)")

    folder = tmp_path / "data" / "python_stdlib"
    make_shards(folder)
    train, val = (np.array(open_shard(folder / f"stdlib_{s}.bin")) for s in ("train_000001", "val_000000"))
    assert len(train) > 4_000_000 and 100_000 < len(val) < len(train) / 5
    assert train[0] == val[0] == 256 and max(train.max(), val.max()) == 256
    first = train[1 : 1 + int((train[1:] == 256).argmax())]
    assert "import" in bytes(first.astype(np.uint8)).decode() or len(first) < 500
    written = (folder / "stdlib_val_000000.bin").stat().st_mtime_ns
    make_shards(folder)
    assert (folder / "stdlib_val_000000.bin").stat().st_mtime_ns == written
    assert [p.name for p in folder.parent.iterdir()] == ["python_stdlib"]
    with pytest.raises(Failure), monkeypatch.context() as patches:
        patches.setattr(data.python_stdlib, "write_shard", write_nothing)
        make_shards(tmp_path / "full" / "python_stdlib")
    assert not list((tmp_path / "full").iterdir())
    with pytest.raises(UserError, match="cannot be made .File exists.: start in another folder"):
        make_shards(folder / "stdlib_val_000000.bin" / "x")


def test_bytes_tokenizer_round_trip():
    tokenizer = load_tokenizer("bytes")
    text = "naïve 日本 <|endoftext|>\n"
    assert decode(tokenizer, tokenizer.encode_ordinary(text)) == text
    assert decode(tokenizer, tokenizer.encode_ordinary("half \ud83d a pair")) == "half \ufffd a pair"
    assert decode(tokenizer, [256, 0xFF, 65]) == "<|endoftext|>\ufffdA"
