#!/usr/bin/env python3
"""Say what is in a checkpoint and whether it is whole; compare two.

Exit code 0: whole, finite and the same as --diff, as far as was asked for. 1: not. 2: usage.
"""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_trinity.command_line.conversion import (
    add_memory_argument,
    memory_bytes,
    start_conversion,
)
from megatron_trinity.command_line.parser import command_parser, require_parent
from megatron_trinity.errors import TrinityError, run_command
from megatron_trinity.progress import progress_for_terminal
from megatron_trinity.tables import print_table

if TYPE_CHECKING:
    from megatron_trinity.checkpoint.inspect import Inspection
    from megatron_trinity.checkpoint.statistics import Difference

EXAMPLE = """example:
  python tools/inspect_checkpoint.py runs/mine --checksums --norms
  python tools/inspect_checkpoint.py runs/mine/iter_0001000 --diff runs/other
"""
LISTED = 24
"""Files and tensors that are listed before the rest is counted; --json has all."""


def parse_command_line() -> Namespace:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("directory", type=Path, help="a run's directory, or one iteration in it")
    parser.add_argument(
        "--checksums", action="store_true", help="read every file and compare with the manifest"
    )
    parser.add_argument(
        "--norms",
        action="store_true",
        help="norm, largest magnitude and values that are not finite, of every tensor",
    )
    parser.add_argument(
        "--diff", type=Path, metavar="OTHER", help="compare with another checkpoint, of any layout"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it as JSON")
    add_memory_argument(parser)
    return parser.parse_args()


def main() -> None:
    command = parse_command_line()
    memory = memory_bytes(command.memory_gb)
    require_parent("--json", command.json)
    start_conversion()

    from megatron_trinity.checkpoint.hf.files import write_json
    from megatron_trinity.checkpoint.inspect import inspect_checkpoint
    from megatron_trinity.checkpoint.statistics import compare, tensor_statistics
    from megatron_trinity.checkpoint.torch_dist.read import TorchDistCheckpoint

    found: dict[str, Any] = {"iterations": print_iterations(command.directory)}
    inspection = inspect_checkpoint(command.directory, command.checksums)
    print_inspection(inspection, command.checksums)
    found |= {"whole": inspection.is_whole, **asdict(inspection)}
    wrong = [
        *inspection.faults[:1],
        *(f"{inspection.path}: {u}" for u in inspection.unreadable[:1]),
    ]
    checkpoint = TorchDistCheckpoint(inspection.path)
    if command.norms:
        statistics = tensor_statistics(checkpoint, memory, progress_for_terminal)
        rows = [(key, s.norm, s.largest, s.nonfinite) for key, s in statistics.items()]
        print_table("norm", ("", "norm", "largest", "not finite"), rows)
        found["norms"] = {key: asdict(s) for key, s in statistics.items()}
        broken = [key for key, s in statistics.items() if s.nonfinite]
        if broken:
            wrong.append(
                f"{inspection.path} has values that are not finite in {len(broken)} tensors, "
                f"{broken[0]} the first, so no training goes on from it"
            )
    if command.diff:
        other = TorchDistCheckpoint(command.diff)
        difference = compare(checkpoint, other, memory, progress_for_terminal)
        print_difference(difference)
        found["diff"] = {"other": str(other.path), **asdict(difference)}
        if difference.tensors_differ:
            wrong.append(f"{other.path} differs from {checkpoint.path}")
    if command.json:
        write_json(command.json, json.loads(json.dumps(found, default=str)))
    if wrong:
        more = f" ({len(inspection.faults) - 1} more above)" if len(inspection.faults) > 1 else ""
        prefix = f"{inspection.path} is not whole: " if inspection.faults else ""
        raise TrinityError(f"{prefix}{wrong[0]}{more}")


def print_iterations(directory: Path) -> dict[str, str | None]:
    """Say which checkpoints there are beside each other, and what is wrong with them."""
    from megatron_trinity.checkpoint.inspect import iterations_of
    from megatron_trinity.checkpoint.iterations import METADATA

    run = directory.parent if (directory / METADATA).is_file() else directory
    found = {one.name: one.fault for one in iterations_of(run)}
    rows = [(name, fault or "whole, by the sizes of its files") for name, fault in found.items()]
    print_table("in the directory", ("", ""), rows)
    return found


def print_inspection(inspection: Inspection, checksums: bool) -> None:
    parameters = inspection.parameters
    total = [("total", sum(parameters.values()))]
    print_table("checkpoint", ("", ""), [("path", inspection.path)])
    print_table("model", ("", ""), known(inspection.model))
    print_table("parameters", ("", ""), [*parameters.items(), *total])
    print_table("written by", ("", ""), known({**inspection.layout, **inspection.optimizer}))
    progress = {name: getattr(inspection, name) for name in ("iteration", "samples", "tokens")}
    print_table("trained", ("", ""), list(progress.items()))
    files = list(inspection.files.items())
    print_table("file", ("", "bytes"), files[:LISTED])
    if len(files) > LISTED:
        rest = sum(size for _, size in files[LISTED:])
        print_table("file", ("", "bytes"), [(f"{len(files) - LISTED} more", rest)])
    rows = [
        (kind, dtype, size)
        for kind, dtypes in inspection.tensor_bytes.items()
        for dtype, size in dtypes.items()
    ]
    print_table("bytes", ("", "", "bytes"), [*rows, ("rest", "", inspection.rest_bytes)])
    extra = inspection.extra_states
    print_table("object", ("",), [(key,) for key in extra[:LISTED]])
    if len(extra) > LISTED:
        print_table("object", ("", "objects"), [("more", len(extra) - LISTED)])
    print_table("fault", ("",), [(fault,) for fault in inspection.faults])
    print_table("training cannot load it", ("",), [(line,) for line in inspection.unreadable])
    if inspection.is_whole:
        loads = "" if inspection.unreadable else "; training can load it"
        how = "checksums" if checksums else "sizes"
        print(f"whole, by {how} of all files and every chunk{loads}")


def known(values: dict[str, Any]) -> list[tuple[str, Any]]:
    """What is not None."""
    return [(name, value) for name, value in values.items() if value is not None]


def print_difference(difference: Difference) -> None:
    print_table("argument", ("", "here", "there"), [(n, *v) for n, v in difference.args.items()])
    print_table("only here", ("",), [(key,) for key in difference.only_first])
    print_table("only there", ("",), [(key,) for key in difference.only_second])
    print_table("form", ("", "here", "there"), [(k, *v) for k, v in difference.forms.items()])
    rows = [(key, d.largest, d.relative) for key, d in difference.tensors.items()]
    print_table("values", ("", "largest difference", "relative norm"), rows)
    print(f"{difference.same} tensors are bitwise alike, {len(rows)} have other values")


if __name__ == "__main__":
    run_command(main)
