"""Tokenize your own text into shards that train_gpt2.py reads.

python -m data.tokenize_text books/ --out data/books --val_tokens 1000000
python -m data.tokenize_text 'dump/*.jsonl.zst' notes.md --out data/mine --workers 16
python train_gpt2.py --config configs/gpt2_124m.toml --train_data data/books --val_data data/books

Read are .txt and .md (a file is a document), .jsonl (a line is one) and .parquet (a row is one; needs pyarrow); the
first three also as .gz and .zst. The text is taken as it is, and "<|endoftext|>" in it is ordinary text. Inputs keep
the order in which they are named, files of a folder or glob go by path, so neither --workers nor an interruption
changes a byte of the shards. The same command again goes on where it was stopped.
"""

import codecs
import glob
import gzip
import hashlib
import json
import os
import re
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import zstandard

import cli
from cli import Parser, Progress, UserError, notice, replacing
from data.shards import ShardWriter, only_writer, open_shard, writing
from data.tokenizer import END_OF_TEXT, VOCAB_SIZE, encode_documents, load_tokenizer

BLOCK = 2**20  # characters that a thread encodes at a time, and bytes read at a time
LONGEST_LINE = 2**26  # of a .jsonl file, in characters
LONGEST_WORD = 2**24  # in characters; no language has such words, but what is no text may
LONGEST_GAP = 2**18  # spaces and line ends in a row (up to twice as many may pass); tiktoken fails at a million
VAL = "text_val_000000.bin"
JOB = "text.json"  # in the folder of the shards: what they are made from, and how far
# GPT-2 splits text into words before it merges bytes, and a word never goes on after a space or newline that follows
# something else: tokens of the text before such a place and after it are the tokens of the whole
WORD_END = re.compile(r"\S(?=[ \n])")

# -----------------------------------------------------------------------------
# reading


def kind(path):
    """("jsonl", "zst") of x.jsonl.zst: what a file holds and how it is packed ("" if it is not); None if not read."""
    name, packed = path.name.lower(), ""
    if name.endswith((".gz", ".zst")):
        name, packed = name.rsplit(".", 1)
    holds = name.rsplit(".", 1)[-1] if "." in name else ""
    return (holds, packed) if holds in ("txt", "md", "jsonl") or (holds, packed) == ("parquet", "") else None


def files_below(folder):
    """The files in a folder and those in it, also where these are links. Raises UserError if one cannot be read."""

    def refuse(error):
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    seen = set()
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(here)) in seen:  # links may go in circles
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(here, name) for name in names)


def find_texts(inputs):
    """The files that the command line names: files, folders with all that is in them, globs; each file once."""
    found = {}
    for name in inputs:
        path = Path(name)
        if os.path.isfile(path):
            if not kind(path):
                raise UserError(f"{name}: read are .txt, .md, .jsonl (each also .gz or .zst) and .parquet")
            paths = [path]
        else:
            several = files_below(path) if os.path.isdir(path) else map(Path, glob.glob(name, recursive=True))
            paths = sorted(p for p in several if kind(p) and os.path.isfile(p))
        if not paths:
            raise UserError(f"{name}: no such file or folder, or no text in it (.txt, .md, .jsonl, .parquet)")
        found |= {p.resolve(): p for p in paths if p.resolve() not in found}
    table = next((p for p in found.values() if kind(p)[0] == "parquet"), None)
    if table and not find_spec("pyarrow"):
        raise UserError(f"{table}: reading .parquet needs pyarrow: pip install pyarrow")
    return list(found.values())


def unpack(file, packed):
    """Yield the bytes of an open file, about BLOCK at a time."""
    if packed == "zst":
        unpacker, unpacked = None, bytearray()
        while data := file.read(2**9):  # little, because it may hold ten thousand times as much
            while data:  # frames may follow one another
                unpacker = unpacker or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
                unpacked += unpacker.decompress(data)
                data, unpacker = (unpacker.unused_data, None) if unpacker.eof else (b"", unpacker)
            if len(unpacked) >= BLOCK:
                yield unpacked
                unpacked = bytearray()
        yield unpacked
        if unpacker:
            raise EOFError("the compressed file ends too early")
    else:
        stream = gzip.GzipFile(fileobj=file) if packed == "gz" else file
        while data := stream.read(BLOCK):
            yield data


def as_text(path, chunks):
    """Yield the text of some bytes, without a mark that it is UTF-8. Raises UserError where it is not."""
    decoder, read, mark = codecs.getincrementaldecoder("utf-8")(), 0, "\ufeff"
    for chunk in chunks:
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk).removeprefix(mark)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: byte {read - pending + error.start} is not UTF-8 text: convert the file, or leave it out"
            ) from None
        yield text
        read, mark = read + len(chunk), "" if text else mark
    if decoder.getstate()[0]:
        raise UserError(f"{path}: ends within a character of UTF-8: is it cut?")


def pieces(path, chunks):
    """Cut a document, given as an iterable of text, where words end: yields (whether it starts here, text)."""
    starts, rest = True, ""
    for chunk in chunks:
        searched = max(BLOCK, len(rest) - 1)
        rest += chunk
        while match := WORD_END.search(rest, searched):
            yield starts, without_gap(path, rest[: match.end()])
            starts, rest, searched = False, rest[match.end() :], BLOCK
        if len(rest) > LONGEST_WORD:
            raise UserError(f"{path}: {LONGEST_WORD:,} characters and no word ends: is this text?")
    yield starts, without_gap(path, rest)


def without_gap(path, text):
    """The text, which is refused where it has nothing but spaces and line ends for too long."""
    blocks = (text[i : i + LONGEST_GAP] for i in range(0, len(text) - LONGEST_GAP + 1, LONGEST_GAP))
    if any(map(str.isspace, blocks)):
        raise UserError(f"{path}: {LONGEST_GAP:,} spaces or line ends in a row: is this text?")
    return text


def lines(path, chunks):
    """Yield (number from 1, line) of a text."""
    number, rest = 1, ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        for line in whole:
            yield number, line
            number += 1
        if len(rest) > LONGEST_LINE:
            raise UserError(f"{path}: line {number} has over {LONGEST_LINE:,} characters: save it as a .txt file")
    yield number, rest


def json_text(path, number, line, field):
    """The text of a line of a .jsonl file."""
    try:
        text = json.loads(line)[field]
    except (ValueError, RecursionError):
        raise UserError(f"{path}: line {number} is not JSON") from None
    except (KeyError, TypeError):
        raise UserError(f"{path}: line {number} has no {field!r}: --field names what holds the text") from None
    if not isinstance(text, str):
        raise UserError(f"{path}: line {number}: {field!r} is not text but {json.dumps(text)[:50]}")
    return text


def parquet_texts(path, file, field):
    """Yield the texts of a column."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        if field not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise UserError(f"{path}: has no {field!r} but {names}: --field names what holds the text")
        for batch in table.iter_batches(batch_size=64, columns=[field]):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str):
                    raise UserError(f"{path}: column {field!r} holds {type(text).__name__} where text should be")
                yield text
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error


def read_file(path, file, field):
    """Yield the pieces of all documents of an open file."""
    holds, packed = kind(path)
    if holds == "parquet":
        for text in parquet_texts(path, file, field):
            yield from pieces(path, [text])
        return
    texts = as_text(path, unpack(file, packed))
    if holds == "jsonl":
        for number, line in lines(path, texts):
            if line and not line.isspace():
                yield from pieces(path, [json_text(path, number, line, field)])
    else:
        yield from (piece for piece in pieces(path, texts) if piece != (True, ""))


def read_batches(paths, field):
    """Yield (pieces, bytes on disk behind them), BLOCK characters or a little more of them at a time."""
    batch, size, before = [], 0, 0
    for path in paths:
        try:
            with open(path, "rb") as file:
                empty = True
                for piece in read_file(path, file, field):
                    empty = False
                    batch.append(piece)
                    size += len(piece[1]) + 1
                    if size > BLOCK:
                        yield batch, before + file.tell()
                        batch, size = [], 0
                before += os.fstat(file.fileno()).st_size
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
        if empty:
            notice(f"{path}: no text in it, passed over")
    if batch:
        yield batch, before


# -----------------------------------------------------------------------------
# encoding


def encode_all(batches, encoder, workers):
    """Yield (tokens, bytes on disk behind them) of every batch in order; only a few batches are in memory."""
    ahead = deque()
    with ThreadPoolExecutor(workers) as threads:  # tiktoken lets go of Python's lock while it encodes
        for batch, behind in batches:
            ahead.append((threads.submit(encoder, batch), behind))
            if len(ahead) > 2 * workers:
                tokens, behind = ahead.popleft()
                yield tokens.result(), behind
        for tokens, behind in ahead:
            yield tokens.result(), behind


# -----------------------------------------------------------------------------
# writing


def open_job(folder, job):
    """Where to go on: the state of the job in `folder`, or a new one. Refuses a folder with other shards."""
    fresh = {"job": job, "finished": False, "shards": [], "batches": 0, "offset": 0, "mb": 0, "documents": 0}
    try:
        state = json.loads((folder / JOB).read_text(encoding="utf-8"))
        if not isinstance(state["job"], dict) or not isinstance(state["shards"], list):
            raise ValueError("not written by this command")
    except FileNotFoundError:
        state = {"job": None, "shards": []}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / JOB}: cannot be read ({error!r}): name another --out") from error
    if state["job"] != job and state["shards"]:
        differs = ", ".join(name for name in job if job[name] != state["job"].get(name))
        raise UserError(f"--out {folder} holds shards that differ from this command in {differs}: name another folder")
    if state["job"] != job:
        if any(p.suffix in (".bin", ".npy") for p in folder.iterdir()):
            raise UserError(f"--out {folder} holds shards already: name another folder")
        return fresh
    try:
        for name in state["shards"]:
            open_shard(folder / name)
    except UserError as error:
        notice(f"making all shards again: {error}")
        return fresh
    return state


def save_job(folder, state):
    with writing(folder / JOB), replacing(folder / JOB) as temporary:
        temporary.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def write_shards(paths, folder, job, workers):
    """Tokenize files into shards, or finish what an interrupted run began. Returns the state of the job."""
    state = open_job(folder, job)
    if state["finished"]:
        notice(f"{folder} is finished: nothing to do")
        return state
    if state["shards"]:
        notice(f"going on after {state['shards'][-1]}")
    save_job(folder, state)
    end_of_text = END_OF_TEXT[job["tokenizer"]]
    encoder = partial(encode_documents, load_tokenizer(job["tokenizer"]), end_of_text)
    batches = islice(read_batches(paths, job["field"]), state["batches"], None)
    progress = Progress(-(-job["bytes"] // 10**6), "MB", "tokenizing", done=state["mb"])
    shard, at = None, state["offset"]
    try:
        for number, (tokens, behind) in enumerate(encode_all(batches, encoder, workers), state["batches"]):
            documents = np.flatnonzero(tokens == end_of_text)  # where they start, since text never has this token
            while at < len(tokens):
                validation = job["val_tokens"] > 0 and VAL not in state["shards"]
                if shard is None:
                    trained_on = len(state["shards"]) - (VAL in state["shards"])
                    shard = ShardWriter(folder / (VAL if validation else f"text_train_{trained_on + 1:06d}.bin"))
                if validation:  # up to the first document that starts behind val_tokens
                    ends = documents[(documents >= at) & (documents - at + shard.tokens >= job["val_tokens"])]
                else:
                    ends = [end for end in [at + job["shard_tokens"] - shard.tokens] if end <= len(tokens)]
                end = int(ends[0]) if len(ends) else len(tokens)
                shard.append(tokens[at:end])
                state["documents"] += int(((documents >= at) & (documents < end)).sum())
                at = end
                if len(ends):
                    finish(shard, state, folder, batches=number, offset=at, mb=progress.done)
                    shard = None
            at = 0
            progress.update(max(0, min(behind // 10**6, progress.total) - progress.done))
        if shard is None and not state["shards"]:
            raise UserError(f"{paths[0]}: no text in all {len(paths)} input files")
        if job["val_tokens"] and VAL not in state["shards"]:
            raise UserError(f"--val_tokens {job['val_tokens']} takes every document: nothing is left to train on")
        state["finished"] = True
        if shard:
            finish(shard, state, folder)
            shard = None
        else:
            save_job(folder, state)
        progress.update(progress.total - progress.done)
    finally:
        progress.close()
        if shard:
            shard.discard()
    return state


def finish(shard, state, folder, **position):
    """Give a shard its name, then note where the next one starts: killed in between, it is made once more."""
    shard.finish()
    state |= {"shards": [*state["shards"], shard.path.name], **position}
    save_job(folder, state)


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("inputs", nargs="+", metavar="FILE|FOLDER|GLOB", help="the text")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the shards go, text_train_000001.bin ...")
    parser.add_argument("--tokenizer", default="gpt2", metavar="NAME", help="gpt2 or bytes [gpt2]")
    parser.add_argument("--field", default="text", metavar="NAME", help="what holds text in .jsonl and .parquet [text]")
    parser.add_argument("--shard_tokens", type=int, default=10**8, metavar="N", help="tokens a shard [100000000]")
    parser.add_argument(
        "--val_tokens", type=int, default=0, metavar="N", help="the first documents with so many tokens validate [0]"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="threads [one a core]")
    args = parser.parse_args(argv)
    if args.tokenizer not in VOCAB_SIZE:
        raise UserError(f"--tokenizer should be one of {', '.join(VOCAB_SIZE)}, not {args.tokenizer!r}")
    for name, least, most in (("shard_tokens", 1000, 2**31 - 1), ("val_tokens", 0, 2**30), ("workers", 1, 1024)):
        if not least <= getattr(args, name) <= most:
            raise UserError(f"--{name} should be from {least} to {most}, not {getattr(args, name)}")
    began, paths, folder = time.monotonic(), find_texts(args.inputs), Path(args.out)
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    job = {name: getattr(args, name) for name in ("tokenizer", "field", "shard_tokens", "val_tokens")}
    job |= {"files": len(paths), "bytes": sum(size for _, size, _ in stats)}
    job["names, sizes and dates of the files"] = hashlib.sha256(repr(stats).encode()).hexdigest()
    with only_writer(folder, "--out"):
        state = write_shards(paths, folder, job, args.workers)
    seconds, tokens = time.monotonic() - began, sum(len(open_shard(folder / name)) for name in state["shards"])
    notice(
        f"{folder}: {len(state['shards'])} shards, {tokens:,} tokens, {state['documents']:,} documents; "
        f"{job['bytes'] / 1e6:.1f} MB read in {seconds:.1f} s ({job['bytes'] / 1e6 / seconds:.1f} MB/s)"
    )


if __name__ == "__main__":
    cli.run(main)
