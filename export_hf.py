"""Write a checkpoint as a folder that transformers' GPT2LMHeadModel.from_pretrained loads, bit for bit.

python export_hf.py --run_dir runs/NAME --out gpt2-mine
"""

import os

from safetensors import SafetensorError

import checkpoint
import cli
from cli import Parser, UserError, notice
from data.tokenizer import END_OF_TEXT
from model import save_hf


def main(argv=None):
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run_dir", metavar="RUN", help="take the newest sound checkpoint of a run")
    source.add_argument("--checkpoint", metavar="PATH", help="take this checkpoint")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder for config.json and model.safetensors")
    args = parser.parse_args(argv)
    if not args.out:
        raise UserError("--out is empty: name a folder")
    if os.path.isfile(os.path.join(args.out, "model.safetensors")):
        raise UserError(f"--out {args.out} holds a model.safetensors: name another folder, or remove it")
    state = checkpoint.load_from(args.run_dir, args.checkpoint)
    model = checkpoint.load_model(state)
    with checkpoint.reading(args.run_dir or args.checkpoint):
        end_of_text = END_OF_TEXT[state["config"]["tokenizer"]]
    try:
        save_hf(model, args.out, end_of_text)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {args.out}: cannot be written ({getattr(error, 'strerror', error)})") from error
    if model.config.attention == "entmax":
        notice(
            "transformers computes softmax attention: these weights were trained with entmax, its losses will differ"
        )
    notice(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
