#!/usr/bin/env python3
"""Rewrite a checkpoint offline: for another layout or format, in other files, without its state."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron_trinity.arguments.checkpoints import FORMATS
from megatron_trinity.command_line.conversion import (
    add_resource_arguments,
    memory_and_workers,
    start_conversion,
)
from megatron_trinity.command_line.parser import command_parser, require_at_least_one
from megatron_trinity.errors import UsageError, run_command

EXAMPLE = """example:
  python tools/reshard.py --load runs/mine --save runs/mine-tp2 --to tp=2,pp=2,ep=4,etp=1
  python tools/reshard.py --load runs/mine --save runs/weights --no-optimizer --files 8
  python tools/reshard.py --load runs/mine --save runs/legacy --to tp=2,ep=2 --format torch
"""


def parse_command_line() -> Namespace:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--load", type=Path, required=True, help="run, or one iteration in it")
    parser.add_argument("--save", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--to",
        metavar="LAYOUT",
        help="tp=, pp=, vpp=, stages=, ep=, etp=, cp=, dp=, between commas; what is left out is 1, "
        "etp as tp, dp as small as it can be (default: the run's layout)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="torch_dist",
        help="torch_dist, for any layout, or torch, a file a rank (default: %(default)s)",
    )
    parser.add_argument(
        "--files", type=int, metavar="N", help="files of tensors (default: as few as memory allows)"
    )
    parser.add_argument(
        "--no-optimizer", action="store_true", help="leave out the optimizer's state"
    )
    add_resource_arguments(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check all but checksums, and write nothing"
    )
    return parser.parse_args()


def main() -> None:
    command = parse_command_line()
    require_at_least_one("--files", command.files)
    if command.format == "torch" and command.files:
        raise UsageError("--format torch has a file a rank: leave out --files")
    start_conversion()

    from megatron_trinity.checkpoint.layout_args import parse_layout_text
    from megatron_trinity.checkpoint.reshard import reshard
    from megatron_trinity.progress import progress_for_terminal

    memory, workers = memory_and_workers(command.memory_gb, command.workers)
    done = reshard(
        command.load,
        command.save,
        layout=parse_layout_text(command.to) if command.to is not None else None,
        files=command.files,
        ckpt_format=command.format,
        optimizer=not command.no_optimizer,
        memory_bytes=memory,
        workers=workers,
        dry_run=command.dry_run,
        show=progress_for_terminal,
    )
    for note in done.notes:
        print(f"note: {note}")
    verb = "would write" if command.dry_run else "wrote"
    print(f"{verb} {done.target}: {done.nbytes / 1e6:,.1f} MB of tensors in {done.files} files")


if __name__ == "__main__":
    run_command(main)
