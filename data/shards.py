"""Token shards on disk, and the order in which training and validation read them.

A shard is a file of uint16 token ids in one of three formats (README.md beside this file has them byte by byte):
- `.bin`, llm.c's: a header of 256 little-endian int32 (magic 20240520, version 1, token count, zeros), then the tokens;
- `.npy`, build-nanogpt's: a one-dimensional NumPy array of uint16;
- `.bin`, nanoGPT's: the tokens alone, which nothing tells from any other file: read so only where shard_format says so.
All shards together, in the order of their names, are one stream of tokens, and everything here speaks of windows of it:
window w of length T has the inputs w*T .. w*T+T-1 and the targets one later, so no token is lost where a shard ends.
"""

import errno
import glob
import hashlib
import itertools
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from cli import Failure, UserError

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
SHARD_FORMATS = ("auto", "nanogpt")  # by name and header, or headerless .bin


def find_shards(pattern, split, field):
    """The shard files that a user's path names, sorted by file name.

    pattern: a file, a glob, or a folder, which means its `*_<split>_*` shards (split: "train" or "val").
    field: the flag it came by, for the error. Raises UserError where nothing matches.
    """
    if not pattern:
        raise UserError(f"{field} is empty: give a shard, a glob or a folder of shards")
    path = Path(pattern)
    try:
        if path.is_dir():
            names = [path / name for name in os.listdir(path) if f"_{split}_" in name]
            found = [p for p in names if p.suffix in (".bin", ".npy")]
            wanted = f"no *_{split}_*.bin or *_{split}_*.npy in the folder {pattern}"
        else:
            found = [path] if path.exists() else [Path(p) for p in glob.glob(pattern, recursive=True)]
            wanted = f"no file matches {pattern}"
        found = sorted((p for p in found if p.is_file()), key=lambda p: (p.name, str(p)))
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{field}: {pattern!r} cannot be looked for ({reason})") from error
    if not found:
        fetch = "; python -m data.fineweb fetches FineWeb" if "fineweb" in pattern.lower() else ""
        raise UserError(f"{field}: {wanted}{fetch}")
    return found


def open_shard(path, shard_format="auto"):
    """The tokens of one shard as a read-only uint16 array (n,), memory-mapped. Raises UserError if it is not sound."""
    path = Path(path)
    open_bin = {"auto": _open_bin, "nanogpt": _open_headerless}[shard_format]
    try:
        return _open_npy(path) if path.suffix == ".npy" else open_bin(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _open_bin(path):
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256:
        raise UserError(f"{path}: {size} bytes, less than a shard's header ({HEADER_BYTES}): make or fetch it again")
    magic, version, count = (int(x) for x in header[:3])
    if magic != MAGIC:
        raise UserError(
            f"{path}: starts with {magic}, not the magic number {MAGIC} of an llm.c token shard "
            "(nanoGPT's, without a header, need --shard_format nanogpt)"
        )
    if version != VERSION:
        raise UserError(f"{path}: shard version {version}, only version {VERSION} (uint16 tokens) is read")
    if size != HEADER_BYTES + 2 * count or count == 0:
        raise UserError(
            f"{path}: the header promises {count} tokens ({HEADER_BYTES + 2 * count} bytes), the file has {size} "
            "bytes: truncated, empty or damaged; make or fetch it again"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def _open_headerless(path):
    size = path.stat().st_size
    if not size or size % 2:
        raise UserError(f"{path}: {size} bytes are not a whole number of uint16 tokens: empty, cut or another format")
    if np.fromfile(path, dtype="<i4", count=1).tolist() == [MAGIC]:
        raise UserError(f"{path}: has the header of an llm.c token shard: use --shard_format auto")
    return np.memmap(path, dtype="<u2", mode="r")


def _open_npy(path):
    try:
        with warnings.catch_warnings(action="ignore"):
            tokens = np.lib.format.open_memmap(path, mode="r")  # never unpickles
    except OSError:
        raise
    except Exception as error:  # NumPy has a class for each kind of damage
        raise UserError(f"{path}: not a whole .npy array ({error}): make or fetch it again") from error
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise UserError(f"{path}: an array of {tokens.dtype} {tokens.shape}, a shard is one dimension of uint16")
    size = path.stat().st_size
    if not len(tokens):
        raise UserError(f"{path}: an array without tokens: make or fetch it again")
    if size != tokens.offset + tokens.nbytes:
        raise UserError(
            f"{path}: the header promises {len(tokens)} tokens ({tokens.offset + tokens.nbytes} bytes), the file has "
            f"{size} bytes: damaged; make or fetch it again"
        )
    return tokens


@contextmanager
def writing(path):
    """Turn the system's refusal to write a file (disk full, no permission) into a Failure that names it."""
    try:
        yield
    except OSError as error:
        raise Failure(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def only_writer(folder, flag):
    """Make a folder, and guard it against other processes that want to write there. Raises UserError.

    flag: by which the user named it.
    """
    lock = FileLock(folder / ".lock", is_singleton=True)  # the same process may enter again
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{flag} {folder}: another process is writing there") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks does without
            raise UserError(f"{flag} {folder}: cannot be written ({error.strerror or error})") from error
    try:
        yield
    finally:
        lock.release()


class ShardWriter:
    """An llm.c shard that grows. It has its final name only once finish() found it whole and on the disk."""

    def __init__(self, path):
        self.path, self.tokens = Path(path), 0
        self.temporary = self.path.with_name(self.path.name + ".tmp")
        with writing(self.path):
            self.file = open(self.temporary, "wb")
            self.file.write(bytes(HEADER_BYTES))  # which is no header until finish() writes one

    def append(self, tokens):
        """Add token ids, a uint16 array (n,)."""
        with writing(self.path):
            self.file.write(np.ascontiguousarray(tokens, dtype="<u2"))
        self.tokens += len(tokens)

    def finish(self):
        header = np.zeros(256, dtype="<i4")
        header[:3] = MAGIC, VERSION, self.tokens
        with writing(self.path):
            self.file.seek(0)
            self.file.write(header)
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.temporary.replace(self.path)

    def discard(self):
        """Delete what is not finished."""
        with suppress(OSError):  # a full disk, again, for what the buffer still holds
            self.file.close()
        self.temporary.unlink(missing_ok=True)


def write_shard(path, tokens):
    """Write token ids (a uint16 array (n,)) as an llm.c shard. The file has its final name only once it is whole."""
    shard = ShardWriter(path)
    try:
        shard.append(tokens)
        shard.finish()
    except Failure:
        shard.discard()
        raise


class TokenStream:
    """All shards of one split as one stream of tokens, cut into windows of `sequence_length`.

    paths: shard files in stream order. vocab_size: ids from there on are refused when they are read.
    shard_format: "auto" or "nanogpt". Raises UserError for a shard that is not sound, or when all of them do not fill
    one window.
    """

    def __init__(self, paths, sequence_length, vocab_size, shard_format="auto"):
        self.paths, self.sequence_length, self.vocab_size = list(paths), sequence_length, vocab_size
        self.shards = [open_shard(path, shard_format) for path in self.paths]
        self.begins = self.shards[0][:1_000_000]  # shows what the tokens are
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])  # of each shard in the stream, and the end
        self.tokens = int(self.starts[-1])
        self.windows = (self.tokens - 1) // sequence_length
        if self.windows < 1:
            raise UserError(
                f"{self.paths[0]}: {self.tokens} tokens in all, too few for one sequence of {sequence_length}: "
                "shorten sequence_length or add shards"
            )
        # a window belongs to the shard in which it starts
        self.first_window = np.minimum(-(-self.starts // sequence_length), self.windows)

    def window(self, w):
        """Tokens w*T .. w*T+T, (T+1,) uint16: inputs and, shifted by one, targets."""
        begin = w * self.sequence_length
        end = begin + self.sequence_length + 1
        parts = []
        i = int(np.searchsorted(self.starts, begin, side="right")) - 1
        while begin < end:
            stop = min(end, int(self.starts[i + 1]))
            if self.shards[i].base.size() < self.shards[i].offset + self.shards[i].nbytes:  # reading on would kill us
                raise UserError(f"{self.paths[i]}: was cut while it was being read; make or fetch it again")
            part = self.shards[i][begin - int(self.starts[i]) : stop - int(self.starts[i])]
            if part.size and int(part.max()) >= self.vocab_size:
                got = f"token id {int(part.max())}, but the vocabulary has {self.vocab_size} ids"
                raise UserError(f"{self.paths[i]}: {got}: made with another --tokenizer, as gpt2, or damaged")
            parts.append(part)
            begin, i = stop, i + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def batch(self, windows):
        """The given windows (any iterable of n indices) as int64, (n, T+1)."""
        return np.stack([self.window(int(w)) for w in windows]).astype(np.int64)

    def fingerprint(self):
        """A short hash of the stream, the same wherever the shards lie: token counts, first and last 4096 tokens."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{len(shard)}:".encode() + shard[:4096].tobytes() + shard[-4096:].tobytes())
        return digest.hexdigest()[:16]


class BatchOrder:
    """Which window the i-th training sequence is: a pure function of (shards, seed, sequence length).

    Every epoch visits each window once. It takes the shards in a shuffled order and shuffles the windows within each,
    so a disk reads one shard at a time. Ranks and micro-batches only slice this sequence, they never change it.
    """

    def __init__(self, stream, seed):
        self.first_window, self.windows, self.seed = stream.first_window, stream.windows, seed

    def __getitem__(self, i):
        epoch, i = divmod(i, self.windows)
        sizes = np.diff(self.first_window)
        order = permutation(len(sizes), self.seed, epoch)
        ends = np.cumsum(sizes[order])
        position = int(np.searchsorted(ends, i, side="right"))
        shard, size = int(order[position]), int(sizes[order[position]])
        i -= int(ends[position]) - size
        return int(self.first_window[shard]) + int(permutation(size, self.seed, epoch, shard)[i])


@lru_cache(maxsize=8)
def permutation(n, *key):
    """A random order of 0..n-1 that depends on n and the key alone, on every machine and for ever."""
    # sorting raw bits, because NumPy promises the stream of a bit generator to stay, and that of its shuffles not
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(n), kind="stable")


def training_batches(stream, seed, first_sequence, micro_batch_size, device, rank=0, world_size=1):
    """Yield (inputs, targets), each (micro_batch_size, T) int64 on `device`, one micro-batch after the other, for ever.

    Starts at training sequence `first_sequence`, at a step's first micro-batch. The next micro-batch is read and copied
    to the device by a thread while the current one is computed.
    """
    order = BatchOrder(stream, seed)
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def load(first):
        batch = torch.from_numpy(stream.batch(order[i] for i in range(first, first + micro_batch_size)))
        if copies is None:
            return batch.to(device), None
        with torch.cuda.stream(copies):
            return batch.pin_memory().to(device, non_blocking=True), copies.record_event()

    # side by side the ranks take world*micro consecutive sequences, then the next ones
    firsts = itertools.count(first_sequence + rank * micro_batch_size, world_size * micro_batch_size)
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = reader.submit(load, next(firsts))
        while True:
            batch, copied = ahead.result()
            ahead = reader.submit(load, next(firsts))
            if copied is not None:
                torch.cuda.current_stream(device).wait_event(copied)
                batch.record_stream(torch.cuda.current_stream(device))
            yield batch[:, :-1], batch[:, 1:]
