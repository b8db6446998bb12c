"""The validation loss of a run, a checkpoint, or someone else's GPT-2; its answers to HellaSwag; its sparsity.

python evaluate.py --run_dir runs/NAME
python evaluate.py --checkpoint runs/NAME/checkpoint_400 --val_data other/shards --val_tokens 1000000 --json
python evaluate.py --init_from openai-community/gpt2 --val_data data/fineweb10B
python evaluate.py --run_dir runs/NAME --sparsity --prompt "def main():" --out sparsity.png
torchrun --nproc_per_node 8 evaluate.py --run_dir runs/NAME --hellaswag download
"""

import json
import math
import re
import time
from dataclasses import asdict
from pathlib import Path

import checkpoint
import cli
import sparsity
from cli import Parser, UserError, notice, replacing
from data import hellaswag, python_stdlib
from data.hellaswag import HellaSwag
from data.shards import TokenStream, find_shards
from data.tokenizer import VOCAB_SIZE, decode, load_tokenizer
from model import load_hf
from train_gpt2 import (
    Config,
    add_fields,
    answer_hellaswag,
    check_fits,
    check_tokens,
    parse_value,
    saved_config,
    start_machine,
    validate,
    validation_windows,
)

SPARSITY_HELP = f"count and draw the zeros of entmax, by layer and head, on {sparsity.SEQUENCES} validation sequences"


def parse_flags(argv):
    """The arguments, and as a dictionary those fields of Config that they set."""
    epilog = (
        "A run and a checkpoint have fields of their own, which flags override; but attention, alpha and tokenizer are "
        "for --init_from, whose other fields are the paper's."
    )
    parser = Parser(description=__doc__, epilog=epilog)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run_dir", metavar="RUN", help="take the newest sound checkpoint of a run")
    source.add_argument("--checkpoint", metavar="PATH", help="take this checkpoint")
    source.add_argument("--init_from", metavar="NAME", help="take a Hugging Face GPT-2: a folder or a hub name")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of text")
    parser.add_argument("--sparsity", action="store_true", help=SPARSITY_HELP)
    parser.add_argument("--out", metavar="PNG", help="with --sparsity: the picture of the heads [sparsity.png]")
    parser.add_argument("--prompt", metavar="TEXT", help="with --sparsity: draw a head's weights on it, in OUT_map.png")
    parser.add_argument("--head", metavar="LAYER,HEAD", help="with --prompt: which head, from 0,0 [the sparsest]")
    # a checkpoint says these itself; with --init_from: softmax, its own length and vocabulary
    names = "val_data val_tokens shard_format hellaswag tokenizer sequence_length attention alpha"
    names = [*names.split(), "micro_batch_size", "device", "dtype"]
    add_fields(parser, names)
    args = parser.parse_args(argv)
    for name, needed in (("out", "sparsity"), ("prompt", "sparsity"), ("head", "prompt")):
        if getattr(args, name) is not None and not getattr(args, needed):
            raise UserError(f"--{name} goes with --{needed}")
    return args, {name: parse_value(name, getattr(args, name)) for name in names if getattr(args, name) is not None}


def load(args, given):
    """The model, the settings to evaluate it with, and the step of its checkpoint (None with --init_from)."""
    if args.init_from:
        settings = asdict(Config()) | {"attention": "softmax"} | given
        model = load_hf(args.init_from, settings["attention"], settings["alpha"])
        by_size = {size: name for name, size in VOCAB_SIZE.items()}
        by_model = {"tokenizer": by_size.get(model.config.vocab_size, "gpt2")}
        by_model |= {"sequence_length": model.config.n_positions}
        return model, settings | by_model | given, None
    for name in {"attention", "alpha", "tokenizer"} & set(given):
        raise UserError(f"--{name} goes with --init_from: a checkpoint has its own")
    state = checkpoint.load_from(args.run_dir, args.checkpoint)
    with checkpoint.reading(args.run_dir or args.checkpoint):
        settings = asdict(saved_config(state)) | {"device": "auto"} | given
    return checkpoint.load_model(state), settings, state["step"]


def plan_sparsity(args, config, tokenizer_name):
    """What to draw: the path of the picture of all heads, the prompt's token ids or None, its (layer, head) or None."""
    if config.attention == "softmax" or config.alpha == 1:
        hint = "; add --attention entmax" if args.init_from and config.attention == "softmax" else ""
        raise UserError(f"--sparsity is for entmax with alpha above 1: every weight of softmax is positive{hint}")
    if args.head is not None:
        if not re.fullmatch(r"\d{1,9},\d{1,9}", args.head):
            raise UserError(f"--head should be LAYER,HEAD, as in 0,0, not {args.head!r}")
        layer, head = map(int, args.head.split(","))
        if layer >= config.n_layer or head >= config.n_head:
            raise UserError(f"--head {args.head}: this model has 0,0 to {config.n_layer - 1},{config.n_head - 1}")
    tokens = None
    if args.prompt is not None:
        try:
            tokens = load_tokenizer(tokenizer_name).encode_ordinary(args.prompt.encode().decode())
        except UnicodeError as error:
            raise UserError(f"--prompt is not UTF-8 text: {error}") from error
        if not 1 <= len(tokens) <= config.n_positions:
            raise UserError(f"--prompt has {len(tokens)} tokens, the model takes 1 to {config.n_positions}")
    out = Path(args.out if args.out is not None else "sparsity.png")
    sparsity.check_picture(out)
    return out, tokens, None if args.head is None else (layer, head)


def keep_sparsity(args, plan, measured, model, step, settings, machine):
    """Draw what --sparsity measured; of a run's own validation text, write it where compare.py finds it too."""
    if args.run_dir and not (args.val_data or args.sequence_length or args.val_tokens):
        path = Path(args.run_dir) / "sparsity.json"
        try:
            with replacing(path) as temporary:
                temporary.write_text(json.dumps({"step": step, "alpha": model.config.alpha} | measured))
        except OSError as error:
            notice(f"{path}: cannot be written ({error.strerror}): compare.py will not have it")
    out, tokens, head = plan
    sparsity.draw_heads(measured, model.config.alpha, out)
    notice(f"drew {out}")
    if tokens:
        layer, head = head or sparsity.sparsest(measured)
        tokenizer, path = load_tokenizer(settings["tokenizer"]), out.with_stem(out.stem + "_map")
        texts = [decode(tokenizer, [token]) for token in tokens]
        sparsity.draw_map(*sparsity.attention_map(model, tokens, layer, head, machine), texts, layer, head, path)
        notice(f"drew {path}: layer {layer}, head {head}")


def main(argv=None):
    args, given = parse_flags(argv)
    model, settings, step = load(args, given)
    vocab_size, T = VOCAB_SIZE[settings["tokenizer"]], settings["sequence_length"]
    check_fits(model, settings["tokenizer"], T)

    machine = start_machine(settings["device"], settings["dtype"])
    if args.sparsity:
        plan = machine.from_rank_0(lambda: plan_sparsity(args, model.config, settings["tokenizer"]))
    if settings["val_data"] == python_stdlib.FOLDER:
        machine.from_rank_0(python_stdlib.make_shards)
    stream = TokenStream(find_shards(settings["val_data"], "val", "val_data"), T, vocab_size, settings["shard_format"])
    check_tokens(stream, settings["tokenizer"])
    machine.check_agreement(evaluation={"the checkpoint's step": step, "val_data": stream.fingerprint()})
    questions = None
    if given.get("hellaswag"):
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
    result = {} if step is None else {"step": step}
    result |= {"val_loss": loss if math.isfinite(loss) else None, "val_tokens": windows * T, "val_ms": 1e3 * seconds}
    perplexity = math.inf if loss > 700 else math.exp(loss)
    text = f"validation loss {loss:.4f} nats a token (perplexity {perplexity:.2f}) on {windows * T:,} tokens"
    if questions:
        began = time.perf_counter()
        right = answer_hellaswag(model, questions, settings["micro_batch_size"] * T, machine, quiet=False)
        seconds, examples = time.perf_counter() - began, len(questions.labels)
        text += f"\nHellaSwag, {examples:,} examples in {seconds:.1f} s:"
        for name, answers in zip(("acc_norm", "acc"), right, strict=True):
            accuracy = answers.double().mean().item()
            margin = 1.96 * math.sqrt(accuracy * (1 - accuracy) / examples)  # 95% of a normal distribution
            result |= {f"hellaswag_{name}": accuracy, f"hellaswag_{name}_margin_95": margin}
            text += f" {name} {accuracy:.4f} ± {margin:.4f}"
        text += " (95% intervals)"
        result |= {"hellaswag_examples": examples, "hellaswag_ms": 1e3 * seconds}
    if args.sparsity:
        measured = sparsity.measure(model, stream, min(windows, sparsity.SEQUENCES), machine, quiet=False)
        result |= {"sparsity": measured}
        text += f"\n{sparsity.table(measured)}"
    if machine.rank == 0:
        print(json.dumps(result) if args.json else text, flush=True)
        if args.sparsity:
            keep_sparsity(args, plan, measured, model, step, settings, machine)


if __name__ == "__main__":
    cli.run(main)
