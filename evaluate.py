"""The validation loss of a run, a checkpoint, or someone else's GPT-2, on any shards; and its answers to HellaSwag.

python evaluate.py --run_dir runs/NAME
python evaluate.py --checkpoint runs/NAME/checkpoint_400 --val_data other/shards --val_tokens 1000000 --json
python evaluate.py --init_from openai-community/gpt2 --val_data data/fineweb10B
torchrun --nproc_per_node 8 evaluate.py --run_dir runs/NAME --hellaswag download
"""

import json
import math
import time
from dataclasses import asdict

import checkpoint
import cli
from cli import Parser, UserError
from data import hellaswag, python_stdlib
from data.hellaswag import HellaSwag
from data.shards import TokenStream, find_shards
from data.tokenizer import VOCAB_SIZE, load_tokenizer
from model import load_hf
from train_gpt2 import (
    Config,
    add_fields,
    answer_hellaswag,
    check_fits,
    parse_value,
    saved_config,
    start_machine,
    validate,
    validation_windows,
)


def main(argv=None):
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run_dir", metavar="RUN", help="take the newest sound checkpoint of a run")
    source.add_argument("--checkpoint", metavar="PATH", help="take this checkpoint")
    source.add_argument("--init_from", metavar="NAME", help="take a Hugging Face GPT-2: a folder or a hub name")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a line of text")
    # a checkpoint says these itself; with --init_from: softmax, its own length and vocabulary
    names = "val_data val_tokens shard_format hellaswag tokenizer sequence_length attention alpha"
    names = [*names.split(), "micro_batch_size", "device", "dtype"]
    add_fields(parser, names)
    args = parser.parse_args(argv)
    given = {name: parse_value(name, getattr(args, name)) for name in names if getattr(args, name) is not None}

    state = None
    if args.init_from:
        settings = asdict(Config()) | {"attention": "softmax"} | given
        model = load_hf(args.init_from, settings["attention"], settings["alpha"])
        by_size = {size: name for name, size in VOCAB_SIZE.items()}
        settings = settings | {
            "tokenizer": given.get("tokenizer", by_size.get(model.config.vocab_size, "gpt2")),
            "sequence_length": given.get("sequence_length", model.config.n_positions),
        }
    else:
        for name in {"attention", "alpha", "tokenizer"} & set(given):
            raise UserError(f"--{name} goes with --init_from: a checkpoint has its own")
        state = checkpoint.load_from(args.run_dir, args.checkpoint)
        with checkpoint.reading(args.run_dir or args.checkpoint):
            settings = asdict(saved_config(state)) | {"device": "auto"} | given
        model = checkpoint.load_model(state)
    vocab_size, T = VOCAB_SIZE[settings["tokenizer"]], settings["sequence_length"]
    check_fits(model, settings["tokenizer"], T)

    machine = start_machine(settings["device"], settings["dtype"])
    if settings["val_data"] == python_stdlib.FOLDER:
        machine.from_rank_0(python_stdlib.make_shards)
    stream = TokenStream(find_shards(settings["val_data"], "val", "val_data"), T, vocab_size, settings["shard_format"])
    questions = None
    if "hellaswag" in given:
        path = machine.from_rank_0(lambda: hellaswag.find(given["hellaswag"]))
        questions = HellaSwag(path, load_tokenizer(settings["tokenizer"]), model.config.n_positions)
    windows = validation_windows(stream, settings["val_tokens"], quiet=machine.rank > 0)
    began = time.perf_counter()
    try:
        model.to(machine.device)
        loss, _ = validate(model, stream, windows, settings["micro_batch_size"], machine, quiet=False)
    except (RuntimeError, MemoryError) as error:
        cli.explain_memory(error, f"use a --micro_batch_size below {settings['micro_batch_size']}, or --device cpu")
        raise
    seconds = time.perf_counter() - began
    result = {"val_loss": loss, "val_tokens": windows * T, "val_ms": 1e3 * seconds}
    line = f"validation loss {loss:.4f} nats a token (perplexity {math.exp(loss):.2f}) on {windows * T:,} tokens"
    if questions:
        began = time.perf_counter()
        answers = answer_hellaswag(model, questions, settings["micro_batch_size"] * T, machine, quiet=False)
        seconds, examples = time.perf_counter() - began, len(questions.labels)
        line += f"\nHellaSwag, {examples:,} examples in {seconds:.1f} s:"
        for name, accuracy in zip(("acc_norm", "acc"), answers, strict=True):
            margin = 1.96 * math.sqrt(accuracy * (1 - accuracy) / examples)  # 95% of a normal distribution
            result |= {f"hellaswag_{name}": accuracy, f"hellaswag_{name}_margin_95": margin}
            line += f" {name} {accuracy:.4f} ± {margin:.4f}"
        line += " (95% intervals)"
        result |= {"hellaswag_examples": examples, "hellaswag_ms": 1e3 * seconds}
    if machine.rank == 0:
        if state:
            result = {"step": state["step"]} | result
        print(json.dumps(result) if args.json else line)


if __name__ == "__main__":
    cli.run(main)
