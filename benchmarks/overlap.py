"""Is a step with communication under the passes as fast as one without? The tiny preset on ranks.

Runs of the trainer over gloo on this machine, with Muon and sharded state, alternating: gradients
reduced under the backward pass and weights gathered under the next forward pass, against both
behind the passes; in buckets of Megatron's size, which the whole of tiny is less than, and in four.
A figure is the median step of all runs of a side, without the first steps.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from megatron_trinity.command_line.parser import command_parser
from megatron_trinity.command_line.rows import Row, add_json_argument, make_row, write_rows
from megatron_trinity.command_line.scalars import read_scalars
from megatron_trinity.errors import TrinityError, run_command

EXAMPLE = """example:
  python benchmarks/overlap.py
  python benchmarks/overlap.py --quick --json overlap.json
"""
ROOT = Path(__file__).resolve().parent.parent
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
BUCKETS = {"Megatron's buckets": (), "4 buckets": ("--ddp-num-buckets", "4")}
WARM_UP = 3  # steps of a run that are left out
STEP_TIME = "iteration-time"


def step_times(ranks: int, steps: int, flags: Sequence[str]) -> list[float]:
    """Seconds of each step of a run, behind the first ones.

    Raises:
        TrinityError: the run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = (
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={ranks}", "pretrain_trinity.py", "--preset", "tiny"),
            *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "2048"),
            *("--use-distributed-optimizer", *flags),
            *("--train-iters", str(WARM_UP + steps), "--lr-warmup-iters", "1"),
            *("--lr-wsd-decay-iters", "1", "--global-batch-size", "8", "--micro-batch-size", "1"),
            *("--eval-iters", "0", "--num-workers", "0", "--log-interval", "1"),
            *("--log-timers-to-tensorboard", "--tensorboard-dir", folder),
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr + done.stdout).splitlines()
            errors = [line for line in lines if "error:" in line] or lines[-1:]
            raise TrinityError(f"a run on {ranks} ranks failed: {errors[0]}")
        times = read_scalars(Path(folder))[STEP_TIME]
    return [seconds for step, seconds in times.items() if step > WARM_UP]


def compare(ranks: int, buckets: str, steps: int, repetitions: int) -> Row:
    """The two sides on so many ranks, in milliseconds a step; `buckets` is one of `BUCKETS`."""
    with_overlap: list[float] = []
    without: list[float] = []
    for _ in range(repetitions):
        without += step_times(ranks, steps, ())
        with_overlap += step_times(ranks, steps, (*OVERLAP, *BUCKETS[buckets]))
    ours, peer = (1000 * median(times) for times in (with_overlap, without))
    return make_row(f"tiny, {ranks} ranks, {buckets}", ours, peer, "ms")


def main() -> None:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=12, help="of a run, beside the first ones")
    parser.add_argument("--repetitions", type=int, default=2, help="runs of each side")
    parser.add_argument("--quick", action="store_true", help="one case, few steps, one run each")
    add_json_argument(parser)
    arguments = parser.parse_args()
    cases = list(product(arguments.ranks, BUCKETS))
    if arguments.quick:
        cases, arguments.steps, arguments.repetitions = cases[:1], 4, 1
    table = Table("case", "with overlap, ms", "without, ms", "ratio")
    rows = []
    for ranks, buckets in cases:
        row = compare(ranks, buckets, arguments.steps, arguments.repetitions)
        table.add_row(
            row["case"], f"{row['ours']:.0f}", f"{row['peer']:.0f}", f"{row['ratio']:.2f}"
        )
        rows.append(row)
    Console().print(table)
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    run_command(main)
