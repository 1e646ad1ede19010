"""Merge what prepare_data.py --shard I/N made on N machines into what one would have made."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_trinity.command_line.documents import print_datasets
from megatron_trinity.command_line.parser import command_parser
from megatron_trinity.errors import run_command

EXAMPLE = """example, after `prepare_data.py ... --output data/web --shard I/4` for I = 1, 2, 3, 4:
  python tools/merge_data.py --output data/web
"""


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--output", type=Path, required=True, help="the prefix that prepare_data.py was given"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from megatron_trinity.data.shards import merge_shards

    made = merge_shards(arguments.output, arguments.overwrite)
    print_datasets(made, Path(f"{arguments.output}.json"))
    written = ", ".join(f"{arguments.output}_{split}" for split in made["splits"])
    print(f"wrote {written}; the shards {arguments.output}.shard-* are needed no more")


if __name__ == "__main__":
    run_command(main)
