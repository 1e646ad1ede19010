#!/usr/bin/env python3
"""Build a layout's ranks without a cluster, and check what they hold and how stages balance.

Any Megatron or Trinity flag makes a layout of your own; without one it is the recommended layout.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_trinity.command_line.parser import command_parser, require_at_least_one
from megatron_trinity.errors import TrinityError, UsageError, run_command
from megatron_trinity.planning.layouts import RECOMMENDED, Layout, recommended

if TYPE_CHECKING:
    from megatron_trinity.planning.fake_ranks import BuiltRank
    from megatron_trinity.planning.layout_check import LayoutCheck

EXAMPLE = """example:
  python tools/check_layout.py --preset large --world-size 2048
  python tools/check_layout.py --preset large --world-size 256 --sample 4 \\
      --pipeline-model-parallel-size 4 --expert-model-parallel-size 64
  python tools/check_layout.py --all --sample 2
"""
SECONDS_BETWEEN_LINES = 10.0


def parse_command_line() -> tuple[Namespace, list[str]]:
    parser = command_parser(__doc__, EXAMPLE, allow_abbrev=False)
    parser.add_argument("--preset", metavar="NAME", help="a preset, or a YAML file")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks of the layout")
    parser.add_argument("--all", action="store_true", help="every recommended layout")
    parser.add_argument(
        "--sample", type=int, metavar="N", help="build N ranks of each stage (default: all)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes that build ranks, with 0.5 GB each (default: %(default)s)",
    )
    return parser.parse_known_args()


def chosen_layouts(command: Namespace, flags: list[str]) -> tuple[Layout, ...]:
    """The layouts that the command line asks for.

    Raises:
        UsageError: it does not say which, or says so twice.
    """
    if command.all:
        if command.preset or command.world_size or flags:
            raise UsageError("--all takes every recommended layout; leave out the rest")
        return RECOMMENDED
    if command.preset is None or command.world_size is None:
        raise UsageError("give --preset and --world-size, or --all; --help has examples")
    require_at_least_one("--world-size", command.world_size)
    if flags:
        return (Layout(command.preset, command.world_size, tuple(flags)),)
    return (recommended(command.preset, command.world_size),)


def check_layout(layout: Layout, sample: int | None, workers: int) -> LayoutCheck:
    """Build the ranks of `layout`, all or `sample` of each stage."""
    from megatron_trinity.planning.fake_ranks import build_ranks, parse_layout, sample_ranks
    from megatron_trinity.planning.layout_check import LayoutCheck

    args = parse_layout(layout.preset, layout.world_size, layout.flags)
    ranks = sample_ranks(args, sample) if sample else list(range(layout.world_size))
    check = LayoutCheck(args)
    for built in with_progress(build_ranks(args, ranks, workers), len(ranks), layout.name):
        check.add(built)
    return check


def with_progress(items: Iterable[BuiltRank], total: int, what: str) -> Iterator[BuiltRank]:
    """`items`, with a bar on a terminal and a line now and then elsewhere (on stderr)."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, what, total, console=Console(stderr=True), transient=True)
        return
    printed = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - printed >= SECONDS_BETWEEN_LINES:
            printed = time.monotonic()
            print(f"{what}: {done} of {total} ranks built", file=sys.stderr, flush=True)


def report(layout: Layout, check: LayoutCheck, problems: Sequence[str], seconds: float) -> None:
    """Print the stages and what holds."""
    args = check.args
    print(
        f"{layout.name} ranks: DP {args.data_parallel_size}, TP {args.tensor_model_parallel_size}, "
        f"PP {args.pipeline_model_parallel_size}, EP {args.expert_model_parallel_size}, "
        f"ETP {args.expert_tensor_parallel_size}, CP {args.context_parallel_size}; "
        f"{check.built} of {args.world_size} ranks built in {seconds:.0f} s"
    )
    row = "{:>5}  {:<34} {:>17} {:>12} {:>10}".format
    print(row("stage", "layers", "parameters/rank", "FLOPs/mean", "state GB"))
    for stage in check.stages():
        parameters, state = f"{stage.parameters:,}", f"{stage.state_bytes / 1e9:.1f}"
        print(row(stage.number, stage.holds, parameters, f"{stage.share:.3f}", state))
    print(f"parameters over all ranks, copies once: {float(check.parameters()):,.0f}")
    if check.expected != check.parameters():
        print(f"parameters of the model: {check.expected:,}")
    cover = "every value on as many ranks" if check.is_complete else "not judged from a sample"
    print("\n".join(f"wrong: {problem}" for problem in problems) or f"all right; cover: {cover}")
    print()


def main() -> None:
    command, flags = parse_command_line()
    layouts = chosen_layouts(command, flags)
    require_at_least_one("--sample", command.sample)
    require_at_least_one("--workers", command.workers)

    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()

    from megatron_trinity.planning.layout_check import SUMMARY_HEAD, summary_row

    summary, wrong = [], []
    for layout in layouts:
        start = time.monotonic()
        check = check_layout(layout, command.sample, command.workers)
        seconds = time.monotonic() - start
        problems = check.problems()
        report(layout, check, problems, seconds)
        summary.append(summary_row(layout.preset, check))
        wrong += [f"{layout.name}: {problem}" for problem in problems]
    if command.all:
        print("\n".join([SUMMARY_HEAD, *summary]))
    if wrong:
        raise TrinityError(f"{len(wrong)} found; {wrong[0]}")


if __name__ == "__main__":
    run_command(main)
