"""HellaSwag (Zellers et al., 2019): which of four endings continues a text? Answered by a language model's losses.

The model reads the context with each ending; the ending of the lowest loss is its choice. The loss is the mean over the
ending's tokens (acc_norm, which does not favour short endings) or their sum (acc), as in llm.c and build-nanogpt.
"""

import http.client
import json
import os
import urllib.request
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from cli import Failure, Progress, UserError, notice
from data.shards import writing

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"  # the authors' own
EXAMPLES = 10_042  # in it
DOWNLOADED = "data/hellaswag/hellaswag_val.jsonl"


def find(source):
    """The path of the examples that a user names: a file, or "download" for the authors', fetched on first use."""
    path = Path(DOWNLOADED if source == "download" else source)
    if source == "download" and not os.path.exists(path):
        download(path)
    if not os.path.isfile(path):
        raise UserError(f"hellaswag: no file {path} (a .jsonl file of the examples, or download)")
    return path


def download(path):
    """Fetch the validation set; the file has its name only once all examples were found in it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two runs may start at once
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(URL, timeout=30) as response:
            content, progress = b"", Progress(int(response.headers.get("Content-Length", 0)), "bytes", "downloading")
            while chunk := response.read(2**18):
                content += chunk
                progress.update(len(chunk))
            progress.close()
    except (OSError, http.client.HTTPException) as error:
        raise Failure(f"hellaswag: no download from {URL} ({error}): fetch it yourself and give its path") from error
    with writing(path):
        temporary.write_bytes(content)
    found = 0
    with suppress(UserError):
        found = len(read_examples(temporary))
    if found != EXAMPLES:
        temporary.unlink()
        raise Failure(f"hellaswag: {URL} gave no file of {EXAMPLES} examples: try again")
    temporary.replace(path)
    notice(f"{path}: {found} examples")


def read_examples(path):
    """[(context, [four endings], index of the right one)] of a .jsonl file. Raises UserError that names the line."""
    examples = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
            context = example["ctx"] if "ctx" in example else f"{example['ctx_a']} {example['ctx_b']}".strip()
            endings, label = [" " + ending for ending in example["endings"]], int(example["label"])
            if not isinstance(context, str) or len(endings) != 4 or not 0 <= label < 4:
                raise ValueError(f"ctx of type {type(context).__name__}, {len(endings)} endings, label {label}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            wanted = "ctx (or ctx_a and ctx_b), four endings and a label"
            raise UserError(f"{path}: line {number} is no HellaSwag example with {wanted} ({error})") from None
        examples.append((context, endings, label))
    if not examples:
        raise UserError(f"{path}: holds no HellaSwag example")
    return examples


class HellaSwag:
    """The examples as tokens: row 4i + j is the context of example i with its ending j."""

    def __init__(self, path, tokenizer, n_positions):
        """A row longer than n_positions loses the start of its context."""
        self.rows, self.ending_tokens, self.labels = [], [], []  # of the endings: how many of their tokens count
        examples = read_examples(path)
        self.fingerprint = sha256(Path(path).read_bytes()).hexdigest()[:16]
        for context, endings, label in examples:
            self.labels.append(label)
            context = tokenizer.encode_ordinary(context)
            for ending in map(tokenizer.encode_ordinary, endings):
                row = (context + ending)[-n_positions - 1 :]
                self.rows.append(row)
                self.ending_tokens.append(min(len(ending), len(row) - 1))  # nothing predicts the first token of a row

    def batches(self, tokens):
        """Yield (row indices (B,), inputs, targets, in_ending), each (B, T): about B * T = `tokens`, long rows first.

        The rows are padded at their end, where causal attention does not see it.
        """
        order = sorted(range(len(self.rows)), key=lambda i: -len(self.rows[i]))
        while order:
            T = max(1, len(self.rows[order[0]]) - 1)
            taken, order = order[: max(1, tokens // T)], order[max(1, tokens // T) :]
            padded = np.zeros((len(taken), T + 1), dtype=np.int64)
            in_ending = np.zeros((len(taken), T), dtype=bool)
            for b, i in enumerate(taken):
                end = len(self.rows[i])
                padded[b, :end] = self.rows[i]
                in_ending[b, end - 1 - self.ending_tokens[i] : end - 1] = True
            padded = torch.from_numpy(padded)
            yield torch.tensor(taken), padded[:, :-1], padded[:, 1:], torch.from_numpy(in_ending)

    def right(self, losses):
        """Which examples are answered right, by the mean loss (acc_norm) and by the sum (acc): two (examples,) bool.

        losses: the summed loss of the ending of every row, (rows,) float64.
        """
        sums, labels = losses.view(-1, 4), torch.tensor(self.labels)
        means = sums / torch.tensor(self.ending_tokens).view(-1, 4)
        return means.argmin(dim=1) == labels, sums.argmin(dim=1) == labels
