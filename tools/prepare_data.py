"""Tokenise documents into Megatron indexed datasets, one for training and one for validation."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_trinity.command_line.documents import (
    add_selection_arguments,
    add_source_argument,
    format_of_arguments,
    print_datasets,
)
from megatron_trinity.command_line.parser import command_parser
from megatron_trinity.data.documents import PYTHON_STDLIB
from megatron_trinity.errors import run_command

EXAMPLE = f"""example:
  python tools/prepare_data.py --source {PYTHON_STDLIB} --tokenizer data/tokenizer \\
      --output data/stdlib
then train with
  --train-data-path data/stdlib_train --valid-data-path data/stdlib_valid
"""


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__, EXAMPLE)
    add_source_argument(parser)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="a Hugging Face tokenizer's directory or tokenizer.json, OWNER/NAME from the Hub's "
        "cache, or a SentencePiece .model",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="prefix: PREFIX_train.bin, PREFIX.json, ..."
    )
    add_selection_arguments(parser, valid_fraction="share of documents for validation, 0 for none")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's eos token (default: yes)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="processes that tokenise; the result is the same for any number (default: one a CPU)",
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="make part I of N, on N machines; tools/merge_data.py makes one output of all",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from megatron_trinity.data.encode import available_cpus
    from megatron_trinity.data.prepare import PrepareRequest, prepare_dataset
    from megatron_trinity.data.shards import Shard
    from megatron_trinity.progress import progress_for_terminal

    request = PrepareRequest(
        sources=tuple(arguments.source),
        tokenizer=arguments.tokenizer,
        output=arguments.output,
        glob=arguments.glob,
        json_key=arguments.json_key,
        valid_fraction=arguments.valid_fraction,
        append_eod=arguments.append_eod,
        workers=available_cpus() if arguments.workers is None else arguments.workers,
        overwrite=arguments.overwrite,
        format=format_of_arguments(arguments),
        shard=None if arguments.shard is None else Shard.parse(arguments.shard),
    )
    made, is_new = prepare_dataset(request, progress_for_terminal)
    print_datasets(made, request.manifest_path)
    if is_new and request.shard:
        print(f"wrote {request.target}; with all {request.shard.count}: tools/merge_data.py")
    elif is_new:
        print(f"wrote {', '.join(str(request.prefix(split)) for split in request.splits)}")
    else:
        print(f"{request.target} is prepared already; nothing to do")


if __name__ == "__main__":
    run_command(main)
