#!/usr/bin/env python3
"""Plan a run on a cluster: the layouts that fit, best first, with memory, traffic and time.

Any flag of the trainer may be given as well, and is kept: a plan with `--expert-model-parallel-size
64` has that, and the rest is searched for. Without a GPU, from the sizes of the model alone.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_trinity.command_line.parser import (
    command_parser,
    require_at_least_one,
    require_parent,
)
from megatron_trinity.errors import TrinityError, UsageError, run_command

if TYPE_CHECKING:
    from megatron_trinity.planning.plan import Plan

EXAMPLE = """example:
  python tools/plan.py --preset large --gpus 2048 --gpu h100 --train-tokens 17T
  python tools/plan.py --preset large --gpus 512 --gpu h200 --precision fp8-blockwise
  python tools/plan.py --preset mini --gpus 64 --gpu h100 --expert-model-parallel-size 8 \\
      --what-if micro-batch-size=2 --json plan.json
"""


def parse_command_line() -> tuple[Namespace, list[str]]:
    parser = command_parser(__doc__, EXAMPLE, allow_abbrev=False)
    parser.add_argument("--preset", metavar="NAME", required=True, help="a preset, or a YAML file")
    parser.add_argument("--gpus", type=int, metavar="N", required=True, help="of the whole cluster")
    parser.add_argument("--gpu", metavar="NAME", required=True, help="h100, h200, b200 or b300")
    parser.add_argument(
        "--nodes-of", type=int, default=8, metavar="N", help="GPUs of a node (default: %(default)s)"
    )
    parser.add_argument("--sequence-length", type=int, metavar="N", help="in place of the preset's")
    parser.add_argument(
        "--layouts", type=int, default=5, metavar="N", help="shown (default: %(default)s)"
    )
    parser.add_argument(
        "--what-if", metavar="FLAG=VALUE", help="the best layout with another flag, beside it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the layouts shown")
    return parser.parse_known_args()


def changed(flags: Sequence[str], change: str) -> list[str]:
    """Flags with one more: `FLAG=VALUE`, or a flag alone; it wins.

    Raises:
        UsageError: it is no flag.
    """
    name, _, value = change.partition("=")
    if not name.startswith("--"):
        name = f"--{name}"
    if len(name) < 4:
        raise UsageError(f"--what-if {change}: give FLAG=VALUE")
    return [*flags, name, *([value] if value else [])]


def plans(command: Namespace, flags: list[str]) -> list[Plan]:
    """Search, and say what was found.

    Raises:
        TrinityError: nothing fits; it has said what would.
    """
    from megatron_trinity.planning.machines import machine
    from megatron_trinity.planning.page import print_layouts, print_plan
    from megatron_trinity.planning.plan import Goal
    from megatron_trinity.planning.search import search

    if command.sequence_length:
        flags = ["--seq-length", str(command.sequence_length), *flags]
        flags += ["--max-position-embeddings", str(command.sequence_length)]
    goal = Goal(command.preset, command.gpus, machine(command.gpu), command.nodes_of, tuple(flags))
    found = search(goal, command.layouts)
    print(f"{found.tried} layouts of {goal.preset} compared on {goal.gpus} {goal.machine.name}")
    if not found.plans:
        if found.closest is not None:
            print_layouts([found.closest])
            print_plan(found.closest)
        for way in found.ways:
            print(f"it would fit with {way}")
        least = "" if found.closest is None else f"{found.closest.fullest.peak / 1e9:.1f} GB, "
        raise TrinityError(f"no layout fits: {least}and a GPU has {goal.room / 1e9:.1f} GB for it")
    print_layouts(found.plans)
    print_plan(found.plans[0])
    return found.plans


def main() -> None:
    command, flags = parse_command_line()
    for flag in ("gpus", "nodes_of", "layouts", "sequence_length"):
        require_at_least_one("--" + flag.replace("_", "-"), getattr(command, flag))
    require_parent("--json", command.json)

    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()

    from megatron_trinity.planning.page import as_json, print_beside
    from megatron_trinity.planning.plan import make_plan

    found = plans(command, flags)
    rows = [as_json(plan) for plan in found]
    if command.what_if:
        best = found[0]
        other = make_plan(best.goal, changed(best.flags, command.what_if))
        print_beside(best, other, command.what_if)
        rows.append({**as_json(other), "what_if": command.what_if})
    if command.json is not None:
        command.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
