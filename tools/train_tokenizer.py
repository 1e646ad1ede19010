"""Train a byte-level BPE tokenizer with Trinity's pre-tokenizer."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from megatron_trinity.command_line.documents import (
    add_selection_arguments,
    add_source_argument,
    format_of_arguments,
)
from megatron_trinity.command_line.parser import command_parser
from megatron_trinity.data.documents import PYTHON_STDLIB
from megatron_trinity.errors import run_command

EXAMPLE = f"""example:
  python tools/train_tokenizer.py --source {PYTHON_STDLIB} --vocab-size 8192 --output data/tokenizer
"""


def parse_arguments() -> Namespace:
    parser = command_parser(__doc__, EXAMPLE)
    add_source_argument(parser)
    parser.add_argument("--output", type=Path, required=True, help="the tokenizer's directory")
    parser.add_argument(
        "--vocab-size", type=int, default=8192, help="special tokens included (default 8192)"
    )
    add_selection_arguments(
        parser, valid_fraction="leave these documents out; give prepare_data.py the same"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from megatron_trinity.data.tokenizer import TokenizerRequest, make_tokenizer

    print(f"training a tokenizer on {', '.join(arguments.source)}", file=sys.stderr, flush=True)
    made, is_new = make_tokenizer(
        TokenizerRequest(
            sources=tuple(arguments.source),
            output=arguments.output,
            vocab_size=arguments.vocab_size,
            glob=arguments.glob,
            json_key=arguments.json_key,
            valid_fraction=arguments.valid_fraction,
            overwrite=arguments.overwrite,
            format=format_of_arguments(arguments),
        )
    )
    print(f"{made['documents']:,} documents, {made['bytes'] / 1e6:,.1f} MB of text")
    for reason, found in made["skipped"].items():
        print(f"left out: {found['count']:,} {reason} (named in the manifest)")
    size = made["vocab_size"]
    short = f", fewer than {arguments.vocab_size:,}: the text is short"
    print(f"vocabulary: {size:,} tokens{short if size < arguments.vocab_size else ''}")
    figures = made.get("bytes_per_token", {})
    print("bytes a token: " + ", ".join(f"{kind} {value:.2f}" for kind, value in figures.items()))
    print(f"wrote {arguments.output}" if is_new else f"{arguments.output} is this already")


if __name__ == "__main__":
    run_command(main)
