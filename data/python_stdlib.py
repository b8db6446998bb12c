"""The embedded default data: byte-level shards of the Python standard library's own source, made on first use."""

import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

from cli import UserError, notice
from data.shards import write_shard
from data.tokenizer import END_OF_TEXT

FOLDER = "data/python_stdlib"  # what train_data and val_data say to mean these shards
VALIDATE_EVERY = 20  # every twentieth file is held out


def make_shards(folder=FOLDER):
    """Write stdlib_train_000001.bin and stdlib_val_000000.bin to `folder`, unless it is there. One document a file.

    Raises UserError if this Python keeps no library source on disk, or the folder cannot be made.
    """
    folder = Path(folder)
    if os.path.exists(folder):
        return
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    sources = sorted(p for p in library.rglob("*.py") if not skipped & set(p.relative_to(library).parts))
    texts = [np.fromfile(p, dtype=np.uint8) for p in sources]
    documents = [np.append(np.uint16(END_OF_TEXT["bytes"]), text) for text in texts if len(text)]
    if sum(map(len, documents)) < 1_000_000:
        raise UserError(f"no source of the standard library under {library}: give --train_data and --val_data instead")
    held_out = documents[::VALIDATE_EVERY]
    kept = [text for i, text in enumerate(documents) if i % VALIDATE_EVERY]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=folder.name + ".", suffix=".tmp", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}): start in another folder, or give --train_data and --val_data"
        ) from error
    try:
        write_shard(temporary / "stdlib_train_000001.bin", np.concatenate(kept))
        write_shard(temporary / "stdlib_val_000000.bin", np.concatenate(held_out))
        temporary.chmod(0o755)  # mkdtemp's folders are private
        os.rename(temporary, folder)
    except OSError:  # another start was faster
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    notice(f"made {folder} from {len(documents)} files of {library}")
