"""Text from a trained model: the prompt and its continuation on stdout, everything else on stderr.

python sample.py --run_dir runs/NAME --prompt "def main(" --max_new_tokens 200
echo "Once upon a time" | python sample.py --checkpoint runs/NAME/checkpoint_400
"""

import codecs
import os
import stat
import sys
import time

import torch

import checkpoint
import cli
from cli import Parser, UserError, notice
from data.tokenizer import END_OF_TEXT, load_tokenizer
from train_gpt2 import add_fields, check_fits, parse_value, saved_config, start_machine


def read_prompt(args):
    """The prompt from --prompt, from a file, or from stdin where something is piped in; empty otherwise."""
    try:
        if args.prompt is not None and args.prompt != "-":
            return args.prompt.encode().decode()  # refuses what the shell passed on from another encoding
        if args.prompt_file not in (None, "-"):
            with open(args.prompt_file, encoding="utf-8", newline="") as file:
                return file.read()
        asked_for = "-" in (args.prompt, args.prompt_file)
        if asked_for and sys.stdin is None:
            raise UserError("the prompt is to come from stdin, which is closed: give it by --prompt")
        if asked_for or is_piped(sys.stdin):
            return sys.stdin.buffer.read().decode("utf-8")
        return ""
    except OSError as error:
        raise UserError(f"--prompt_file {args.prompt_file}: cannot be read ({error.strerror})") from error
    except UnicodeError as error:
        raise UserError(f"the prompt is not UTF-8 text: {error}") from error


def is_piped(file):
    return file is not None and stat.S_IFMT(os.fstat(file.fileno()).st_mode) in (stat.S_IFIFO, stat.S_IFREG)


def main(argv=None):
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run_dir", metavar="RUN", help="take the newest sound checkpoint of a run")
    source.add_argument("--checkpoint", metavar="PATH", help="take this checkpoint")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to go on from; - or none: from stdin if it is piped")
    prompt.add_argument("--prompt_file", metavar="FILE", help="the same from a file")
    parser.add_argument(
        "--num_samples", type=int, default=1, metavar="N", help="texts to write, one after the other [1]"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=200, metavar="N", help="tokens to add to the prompt [200]"
    )
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 takes the likeliest token [0.8]")
    parser.add_argument(
        "--top_k", type=int, default=0, metavar="N", help="draw from the N likeliest tokens; 0: all [0]"
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, metavar="X", help="draw from the likeliest that fill X [1.0]"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same text [0]")
    parser.add_argument("--no_kv_cache", action="store_true", help="encode the whole text for every token, to compare")
    add_fields(parser, ["device", "dtype"])
    args = parser.parse_args(argv)
    for name in ("num_samples", "max_new_tokens", "temperature", "top_k", "top_p"):
        if not getattr(args, name) >= 0:
            raise UserError(f"--{name} should be at least 0, not {getattr(args, name)}")
    if args.top_p > 1:
        raise UserError(f"--top_p should be from 0 to 1, a share of the probability, not {args.top_p}")
    for name in ("top_k", "seed"):
        if not -(2**63) <= getattr(args, name) < 2**63:
            raise UserError(f"--{name} should be a number of at most 64 bits, not {getattr(args, name)}")

    text = read_prompt(args)
    state = checkpoint.load_from(args.run_dir, args.checkpoint)
    with checkpoint.reading(args.run_dir or args.checkpoint):
        config = saved_config(state)
    device = parse_value("device", args.device or "auto")
    machine = start_machine(device, parse_value("dtype", args.dtype or config.dtype))
    model = checkpoint.load_model(state).to(machine.device)
    check_fits(model, config.tokenizer, 1)
    tokenizer = load_tokenizer(config.tokenizer)
    # an empty prompt is the start of a document
    prompt_tokens = tokenizer.encode_ordinary(text) or [END_OF_TEXT[config.tokenizer]]

    n_positions = model.config.n_positions
    if len(prompt_tokens) > n_positions:
        notice(f"the prompt has {len(prompt_tokens)} tokens, the context {n_positions}: the oldest are left out")

    generator = torch.Generator().manual_seed(args.seed)
    began, written = time.perf_counter(), 0
    for i in range(args.num_samples):
        if args.num_samples > 1:
            notice(f"--- sample {i + 1} of {args.num_samples}")
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
        sys.stdout.write(text)
        with machine.precision():
            for token in model.generate(
                prompt_tokens,
                args.max_new_tokens,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                generator=generator,
                kv_cache=not args.no_kv_cache,
            ):
                sys.stdout.write(decoder.decode(tokenizer.decode_single_token_bytes(token)))
                sys.stdout.flush()
                written += 1
        sys.stdout.write(decoder.decode(b"", final=True) + "\n")
        sys.stdout.flush()
    seconds = time.perf_counter() - began
    notice(f"{written} tokens in {seconds:.1f} s, {written / seconds:.1f} tokens/s")


if __name__ == "__main__":
    cli.run(main)
