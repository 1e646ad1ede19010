"""What does it cost to measure a rank's own time? Training steps with it, and without.

One run of the real trainer with the tiny preset over two ranks: pairs of neighbouring steps, one of
each kind, the order turned around from pair to pair. CPU seconds of rank 0, and how many marks a
step takes, each with its cost in a loop of its own. A run measures five steps of an interval.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_trinity.command_line.parser import command_parser, require_at_least_one
from megatron_trinity.command_line.quickstart import add_data_argument, data_flags, training_data
from megatron_trinity.command_line.rows import add_json_argument, make_row, write_rows
from megatron_trinity.errors import TrinityError, run_command

EXAMPLE = """example:
  bash examples/quickstart.sh    # prepares the data
  python benchmarks/slow_ranks.py --pairs 40
"""

ROOT = Path(__file__).resolve().parent.parent
RESULT = "TRINITY_SLOW_RANKS_RESULT"
"""Variable that tells a rank which file its figures go to."""
WARM_UP = 2  # pairs at the start that are not counted
INTERVAL = 100
CALLS = 20_000


def is_measured(step: int) -> bool:
    """Of steps from 1: the order within a pair is turned around from pair to pair."""
    pair, second = divmod(step - 1, 2)
    return bool(pair % 2) == bool(second)


def rank() -> None:
    """Train, with every other step measured; rank 0 writes CPU seconds and marks of each step."""
    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()

    from megatron_trinity.training import pretrain

    steps: list[tuple[bool, float, int]] = []

    class EverySecond(pretrain.SlowRanks):
        def step_begins(self, iteration: int) -> None:
            self._began = time.process_time()
            if is_measured(iteration):
                self.own.begins()

        def step_read(self, iteration: int) -> None:
            marks = 2 * len(self.own._waits) + len(self.own._marks)
            self.own.read()
            self.own.forget()
            seconds = time.process_time() - self._began
            steps.append((is_measured(iteration), seconds, marks))

    pretrain.SlowRanks = EverySecond  # type: ignore[misc]
    pretrain.pretrain()
    if os.environ["RANK"] == "0":
        Path(os.environ[RESULT]).write_text(json.dumps([steps, seconds_of_a_call()]))


def seconds_of_a_call() -> float:
    """What timing adds to one call that may wait: two marks and their note."""
    from megatron_trinity.training.own_time import OwnTime, _within

    def nothing() -> None:
        pass

    own = OwnTime()
    timed = _within(own._waited, nothing)
    costs = []
    for call in (nothing, timed):
        began = time.process_time()
        for _ in range(CALLS):
            call()
        costs.append((time.process_time() - began) / CALLS)
    return costs[1] - costs[0]


def train(arguments: Namespace, folder: Path) -> Any:
    """What rank 0 has written.

    Raises:
        TrinityError: the run has failed.
    """
    options = {
        "--preset": "tiny",
        "--global-batch-size": 8 if arguments.quick else 32,
        "--micro-batch-size": 4,
        "--expert-model-parallel-size": 2,
        **data_flags(arguments.data),
        "--train-iters": 2 * (arguments.pairs + WARM_UP),
        "--lr-warmup-iters": 0,
        "--eval-iters": 0,
        "--straggler-interval": INTERVAL,
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = [str(word) for pair in options.items() for word in pair]
    told = {RESULT: str(folder / "result.json"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, str(Path(__file__).resolve()), *words],
        env=os.environ | told,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode:
        raise TrinityError(f"the run failed: {done.stderr[-2000:]}")
    return json.loads((folder / "result.json").read_text())


def parse_arguments() -> Namespace:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--pairs", type=int, default=40, help="of steps (default %(default)s)")
    add_data_argument(parser, ROOT)
    add_json_argument(parser)
    parser.add_argument("--quick", action="store_true", help="6 pairs of steps of a quarter")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.pairs = 6
    require_at_least_one("--pairs", arguments.pairs)
    arguments.data = training_data(arguments.data)
    return arguments


def main() -> None:
    if RESULT in os.environ:
        rank()
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        steps, of_a_call = train(arguments, Path(folder))
    counted = steps[2 * WARM_UP :]
    with_it, without = (
        statistics.median(seconds for measured, seconds, _ in counted if measured is kind)
        for kind in (True, False)
    )
    marks = statistics.median(number for measured, _, number in counted if measured)
    alone = marks / 2 * of_a_call
    print(
        f"a step, CPU: {1e3 * with_it:.1f} ms measured, {1e3 * without:.1f} ms not (medians of "
        f"{arguments.pairs})\n"
        f"{marks:.0f} marks a step, {1e6 * of_a_call / 2:.2f} us each: {1e3 * alone:.3f} ms, "
        f"{alone / without:.3%} of a step that is measured, "
        f"{alone / without * 5 / INTERVAL:.4%} of all with --straggler-interval {INTERVAL}"
    )
    rows = [
        make_row("step, CPU time", with_it, without, "s"),
        make_row("step, marks alone added", without + alone, without, "s"),
    ]
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    run_command(main)
