#!/usr/bin/env python3
"""What has happened in a run: as a page with plots, or in words.

A run is its folder with `events.jsonl`: its --run-dir, --save or --tensorboard-dir. The page is one
file, which needs no network; several runs stand in it side by side.
"""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path

from megatron_trinity.command_line.parser import command_parser
from megatron_trinity.errors import TrinityError, UsageError, run_command

EXAMPLE = """example:
  python tools/report.py runs/mine
  python tools/report.py runs/mine runs/other --out report.html
  python tools/report.py runs/mine --out report.html --watch
"""

EVERY = 15.0
"""Seconds between two looks, and after which a browser reads the page again."""


def parse_arguments() -> Namespace:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write a page; else say it in words"
    )
    parser.add_argument(
        "--watch", action="store_true", help="write it again as the runs go on, until interrupted"
    )
    arguments = parser.parse_args()
    if arguments.watch and not arguments.out:
        parser.error("--watch writes a page; give --out FILE as well")
    return arguments


def write_page(folders: list[Path], out: Path, refresh: float | None) -> None:
    from megatron_trinity.reporting.report import page
    from megatron_trinity.reporting.run import open_runs
    from megatron_trinity.upstream.checkpoint_tracker import replacing

    text = page(open_runs(folders), refresh)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as file:  # a browser may be reading
            file.write(text)
    except OSError as error:
        raise TrinityError(f"{out} cannot be written: {error.strerror}") from error


def watch(folders: list[Path], out: Path) -> None:
    """Write the page whenever there is news."""
    seen: list[float] = []
    while True:
        newest = [_changed(folder) for folder in folders]
        if newest != seen:
            write_page(folders, out, EVERY)
            print(f"{time.strftime('%H:%M:%S')} {out}", flush=True)
            seen = newest
        time.sleep(EVERY)


def _changed(folder: Path) -> float:
    from megatron_trinity.reporting.schema import NAME

    try:
        return (folder / NAME if folder.is_dir() else folder).stat().st_mtime
    except OSError as error:
        raise UsageError(f"{folder} has no {NAME}; give the folder of a run") from error


def say(folders: list[Path]) -> None:
    """Print each run as a table."""
    from megatron_trinity.reporting.console import print_rows
    from megatron_trinity.reporting.run import open_runs
    from megatron_trinity.reporting.summary import summary

    for run in open_runs(folders):
        print_rows(run.name, summary(run))


def main() -> None:
    arguments = parse_arguments()
    if arguments.watch:
        watch(arguments.runs, arguments.out)
    elif arguments.out:
        write_page(arguments.runs, arguments.out, None)
        print(arguments.out)
    else:
        say(arguments.runs)


if __name__ == "__main__":
    run_command(main)
