"""Download FineWeb shards, tokenized with GPT-2's tokenizer, from the Hugging Face hub.

python -m data.fineweb                  FineWeb-10B: 103 training shards of 100M tokens and one for validation, 21 GB
python -m data.fineweb --shards 8       the first 8 training shards and the validation shard, 1.8 GB
python -m data.fineweb --edu            FineWeb-Edu-10B: 99 training shards and one for validation

The same command again goes on where it was stopped, and fetches nothing that is there. HF_ENDPOINT names a mirror.
"""

import time
from functools import partial
from pathlib import Path
from shutil import rmtree

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import logging as hub_logging
from tqdm import tqdm

import cli
from cli import Failure, Parser, Progress, UserError, notice
from data.shards import only_writer, open_shard

SETS = {  # name -> repository, prefix of the files, training shards
    "fineweb10B": ("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "finewebedu10B": ("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}
SHARD_MB = 200  # of most shards
ATTEMPTS = 4
STAGING = ".download"  # the folder, in that of the shards, for files that are not checked yet


def is_sound(path):
    """Whether a whole shard is there; a line on stderr for one that is damaged."""
    try:
        return path.exists() and len(open_shard(path)) > 0
    except UserError as error:
        notice(f"fetching it again: {error}")
        return False


def fetch(repository, path, report):
    """Download one shard, check its header and size, and only then give it its name, `path`.

    report: called with the bytes of the file that have come so far. Raises Failure.
    """

    class Bar(tqdm):  # what the hub draws its progress with
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": True})
            self.bytes = kwargs.get("initial", 0)

        def update(self, n=1):
            self.bytes += n
            report(self.bytes)

    damaged = None
    for attempt in range(1, ATTEMPTS + 1):
        try:
            staged = hf_hub_download(
                repository,
                path.name,
                repo_type="dataset",
                local_dir=path.parent / STAGING,
                force_download=damaged is not None,  # the hub's cache on this machine may be what is damaged
                tqdm_class=Bar,
            )
            open_shard(staged)
            Path(staged).replace(path)
            return
        except UserError as error:
            Path(staged).unlink()
            if damaged or attempt == ATTEMPTS:
                raise Failure(f"{path.name}: the hub sent a bad file ({error})") from error
            damaged = reason = error
        except Exception as error:  # the hub, its HTTP client and Xet have a class for each mishap
            # before it says that it cannot find out about a file, the hub has asked several times itself
            asked_enough = attempt == ATTEMPTS or isinstance(error, LocalEntryNotFoundError)
            error = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
            reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if status < 500:
                raise Failure(f"{path.name}: the hub answered {status} for {repository} ({reason})") from error
            if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
                raise Failure(f"{path}: cannot be written ({error.strerror})") from error
            if asked_enough:
                raise Failure(
                    f"{path.name}: no download from {repository} ({reason}): check the connection and run this again"
                ) from error
        notice(f"{path.name}: {reason}: trying again")
        time.sleep(2**attempt)


def download(name, shards, folder):
    """Fetch the validation shard and the first training shards of a set into `folder`."""
    repository, prefix, _ = SETS[name]
    files = [f"{prefix}_val_000000.bin"] + [f"{prefix}_train_{i:06d}.bin" for i in range(1, shards + 1)]
    with only_writer(folder, "--dir"):
        missing = [file for file in files if not is_sound(folder / file)]
        done_mb = sum((folder / file).stat().st_size for file in set(files) - set(missing)) // 10**6
        progress = Progress(done_mb + SHARD_MB * len(missing), "MB", "downloading", done=done_mb)
        try:
            for i, file in enumerate(missing, 1):
                note = f"{file}, {i} of {len(missing)}"
                fetch(repository, folder / file, partial(show, progress, done_mb, note))
                done_mb += -(-(folder / file).stat().st_size // 10**6)
                progress.expect(done_mb + SHARD_MB * (len(missing) - i))
                progress.update(done_mb - progress.done, note)
        finally:
            progress.close()
        rmtree(folder / STAGING, ignore_errors=True)
        tokens = sum(len(open_shard(folder / file)) for file in files)
    notice(f"{folder}: {len(files)} shards, {tokens:,} tokens, {len(files) - len(missing)} of them were there")


def show(progress, before_mb, note, received):
    """Move the bar on to `received` bytes of a file; it stands still while a second attempt catches up."""
    progress.update(max(0, before_mb + received // 10**6 - progress.done), note)


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--shards", type=int, metavar="N", help="training shards to fetch, from the first on [all]")
    parser.add_argument("--dir", metavar="FOLDER", help="where to [data/fineweb10B; with --edu data/finewebedu10B]")
    parser.add_argument("--edu", action="store_true", help="FineWeb-Edu, the educational pages, instead of FineWeb")
    args = parser.parse_args(argv)
    name = "finewebedu10B" if args.edu else "fineweb10B"
    most = SETS[name][2]
    shards = most if args.shards is None else args.shards
    if not 0 <= shards <= most:
        raise UserError(f"--shards should be from 0 to {most}, not {shards}")
    hub_logging.set_verbosity_error()  # mishaps are reported here
    download(name, shards, Path(args.dir or f"data/{name}"))


if __name__ == "__main__":
    cli.run(main)
