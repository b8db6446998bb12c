"""Look into token shards: how many tokens and documents, how the text begins, what is wrong with a bad file.

python -m data.inspect_shards data/fineweb10B
python -m data.inspect_shards 'data/python_stdlib/*.bin'
python -m data.inspect_shards openwebtext/train.bin --shard_format nanogpt
"""

import os
from contextlib import suppress

import numpy as np

import cli
from cli import Parser, Progress, UserError, notice
from data.shards import SHARD_FORMATS, find_shards, open_shard
from data.tokenizer import END_OF_TEXT, VOCAB_SIZE, decode, load_tokenizer

SHOWN = 200  # tokens of text
BLOCK = 2**22  # tokens read at a time


def find(pattern):
    """Shards as train_data and val_data find them; a folder means both."""
    found = []
    for split in ("train", "val") if os.path.isdir(pattern) else ("train",):
        with suppress(UserError):
            found += find_shards(pattern, split, "PATTERN")
    if not found:
        raise UserError(f"{pattern}: no shards there (a file, a glob, or a folder of *_train_* and *_val_* files)")
    return found


def count(path, tokens, tokenizer, progress):
    """The number of documents of a shard. Raises UserError at an id that the tokenizer does not have."""
    documents = 0
    for first in range(0, len(tokens), BLOCK):
        block = tokens[first : first + BLOCK]
        if int(block.max()) >= VOCAB_SIZE[tokenizer]:
            place = first + int((block >= VOCAB_SIZE[tokenizer]).argmax())
            raise UserError(f"{path}: token {place} is {tokens[place]}, tokenizer {tokenizer} has no such id")
        documents += int(np.count_nonzero(block == END_OF_TEXT[tokenizer]))
        progress.update(len(block))
    return documents


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("pattern", metavar="PATTERN", help="a shard, a glob, or a folder of shards")
    parser.add_argument("--shard_format", default="auto", metavar="NAME", help="auto or nanogpt (no header) [auto]")
    parser.add_argument("--tokenizer", metavar="NAME", help="gpt2 or bytes [bytes, if that has all ids at the start]")
    args = parser.parse_args(argv)
    for name, choices in (("tokenizer", VOCAB_SIZE), ("shard_format", SHARD_FORMATS)):
        if getattr(args, name) not in (None, *choices):
            raise UserError(f"--{name} should be one of {', '.join(choices)}, not {getattr(args, name)!r}")
    paths = find(args.pattern)
    shards, bad = {}, {}
    for path in paths:
        try:
            shards[path] = open_shard(path, args.shard_format)
        except UserError as error:
            bad[path] = str(error)
    if not args.tokenizer:
        bytes_alone = all(tokens[:BLOCK].max() < VOCAB_SIZE["bytes"] for tokens in shards.values())
        args.tokenizer = "bytes" if bytes_alone else "gpt2"
    documents, progress = {}, Progress(sum(map(len, shards.values())), "tokens", "reading")
    for path, tokens in shards.items():
        try:
            documents[path] = count(path, tokens, args.tokenizer, progress)
        except UserError as error:
            bad[path] = str(error)
    progress.close()
    for path in paths:
        print(bad.get(path) or f"{path}: {len(shards[path]):,} tokens, {documents[path]:,} documents")
    total = sum(len(shards[path]) for path in documents)
    print(f"{len(documents)} shards: {total:,} tokens, {sum(documents.values()):,} documents")
    if documents:
        first = next(iter(documents))
        try:
            text = decode(load_tokenizer(args.tokenizer), shards[first][:SHOWN].tolist())
            print(f"{first.name} begins:\n{text}")
        except UserError as error:
            notice(f"the text cannot be shown: {error}")
        if not sum(documents.values()):
            notice(f"no document starts here (id {END_OF_TEXT[args.tokenizer]}): made with another tokenizer?")
    if bad:
        raise UserError(f"{args.pattern}: {len(bad)} of {len(paths)} shards are bad (see above)")


if __name__ == "__main__":
    cli.run(main)
