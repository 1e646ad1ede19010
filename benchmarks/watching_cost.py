"""What does watching cost? Training steps with all that watches balance and stability, and without.

One run of the real trainer on one rank: pairs of neighbouring steps, one of each kind, the order
turned around from pair to pair. Watching is the record of micro-batches, speed and memory, load
metrics, alarms, the lines on the console, `events.jsonl` and TensorBoard's scalars. The experts are
balanced in every step, and Megatron's own line and scalars are written in every step.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from megatron_trinity.command_line.parser import command_parser
from megatron_trinity.command_line.quickstart import add_data_argument, data_flags, training_data
from megatron_trinity.command_line.rows import Row, add_json_argument, make_row, write_rows
from megatron_trinity.command_line.single_rank import single_rank_environment
from megatron_trinity.errors import run_command

if TYPE_CHECKING:
    from megatron_trinity.upstream.training_hooks import StepOutcome

EXAMPLE = """example:
  bash examples/quickstart.sh    # prepares the data
  python benchmarks/watching_cost.py --pairs 60
"""

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 2  # pairs at the start that are not counted


@dataclass(frozen=True)
class Step:
    """One step as it was measured; seconds."""

    watched: bool
    wall: float
    cpu: float  # of this process, all threads: neighbours on a busy machine disturb it less
    parts: Mapping[str, float]  # wall time within the hooks


class Stopwatch:
    """Measures steps, and the parts of them that are watching."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._parts: dict[str, float] = {}
        self._began: tuple[float, float] | None = None

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._parts[name] = self._parts.get(name, 0.0) + time.perf_counter() - began

    def step_ended(self, watched: bool) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        if self._began is not None:  # the first step's beginning is unknown
            began, cpu_began = self._began
            self.steps.append(Step(watched, wall - began, cpu - cpu_began, self._parts))
        self._parts, self._began = {}, (wall, cpu)


def is_watched(step: int) -> bool:
    """Of steps from 1: the order within a pair is turned around from pair to pair."""
    pair, second = divmod(step, 2)
    return bool(pair % 2) == bool(second)


def flags(arguments: Namespace, scratch: Path) -> list[str]:
    """The trainer's command line."""
    options = {
        "--preset": "tiny",
        "--global-batch-size": 8 if arguments.quick else 32,
        **data_flags(arguments.data),
        # One more than is measured: the first step's beginning is not seen.
        "--train-iters": 2 * (arguments.pairs + WARM_UP) + 1,
        "--lr-warmup-iters": 2,
        "--lr-wsd-decay-iters": 2,
        "--eval-iters": 0,
        # A line each step, so that each watched step pays for one: the preset writes every tenth.
        "--log-interval": 1,
        "--alarm-window": 20,  # full soon, so that it is computed with
        "--tensorboard-dir": scratch / "tensorboard",
    }
    return [str(word) for pair in options.items() for word in pair]


def measure(argv: Sequence[str], log: Path) -> Stopwatch:
    """Train, with every other step watched; the trainer's output goes into `log`."""
    os.environ |= single_rank_environment()

    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()

    from megatron_trinity.training import observer, pretrain

    watch = Stopwatch()
    balance_experts = observer.balance_experts
    forward_step = pretrain.forward_step

    class EverySecond(observer.StepObserver):
        """Watches every second step, and times it."""

        def step_ended(self, model: Sequence[Any], optimizer: Any, outcome: StepOutcome) -> None:
            if not is_watched(self._iteration):
                with watch.part("balancing"):
                    layers = observer.moe_layers(self._args)
                    balance_experts(model, layers, self._args.num_experts, outcome.applied)
                return
            with watch.part("step_ended"):
                super().step_ended(model, optimizer, outcome)

        def values(self) -> Mapping[str, float]:
            if not is_watched(self._iteration):
                return {}
            with watch.part("log"):
                return super().values()

        def log_written(self, logged: Mapping[str, float]) -> None:
            watched = is_watched(self._iteration)
            if watched:
                with watch.part("log"):
                    super().log_written(logged)
            else:
                self._speed.log_written()
            watch.step_ended(watched)

        def _tell(self, *of_step: Any) -> None:
            with watch.part("events"):
                super()._tell(*of_step)

        def _write(self, values: Mapping[str, float], always: bool = False) -> None:
            with watch.part("TensorBoard"):
                super()._write(values, always)

    def timed_balance(*args: Any) -> Any:
        with watch.part("balancing"):
            return balance_experts(*args)

    def forward(iterator: Any, model: Any, *, record: Any, flops: Any) -> Any:
        from megatron.training import get_args

        watched = is_watched(int(get_args().curr_iteration) + 1)
        return forward_step(iterator, model, record=record if watched else None, flops=flops)

    class TimedRecord(pretrain.MicroBatchRecord):
        def append(self, values: Any) -> None:
            with watch.part("micro-batches"):
                super().append(values)

        def gathered(self, *args: Any) -> Any:
            with watch.part("micro-batches"):
                return super().gathered(*args)

    # The trainer puts itself together from these names.
    replaced = {
        (observer, "balance_experts"): timed_balance,
        (pretrain, "StepObserver"): EverySecond,
        (pretrain, "MicroBatchRecord"): TimedRecord,
        (pretrain, "forward_step"): forward,
    }
    for (module, name), value in replaced.items():
        setattr(module, name, value)
    with log.open("w") as file, contextlib.redirect_stdout(file):
        pretrain.pretrain(argv)
    return watch


def watching_alone(parts: Mapping[str, float]) -> dict[str, float]:
    """Seconds of one watched step by part, each without those that run within it."""
    inner = ("balancing", "TensorBoard", "micro-batches")
    return {
        "micro-batches": parts["micro-batches"],
        "load metrics and alarms": parts["step_ended"] - sum(parts[name] for name in inner),
        "TensorBoard": parts["TensorBoard"],
        "events.jsonl and the console": parts["events"],
        "speed, memory and the sources of data": parts["log"] - parts["events"],
    }


@dataclass(frozen=True)
class Comparison:
    """Medians over pairs, seconds."""

    watched: float
    not_watched: float
    difference: float
    error: float  # standard error of the difference

    @classmethod
    def of(cls, watched: Sequence[float], not_watched: Sequence[float]) -> Comparison:
        """Of the two steps of each pair."""
        differences = [on - off for on, off in zip(watched, not_watched, strict=True)]
        # A median's error, from quartiles: noise on a busy machine is far from normal.
        low, middle, high = statistics.quantiles(differences, n=4, method="inclusive")
        return cls(
            watched=statistics.median(watched),
            not_watched=statistics.median(not_watched),
            difference=middle,
            error=1.253 * (high - low) / 1.349 / len(differences) ** 0.5,
        )


@dataclass(frozen=True)
class Cost:
    """What `measure` found: wall and CPU time of steps, and the watching by itself, by part."""

    wall: Comparison
    cpu: Comparison
    alone: Mapping[str, float]

    @classmethod
    def of(cls, steps: Sequence[Step]) -> Cost:
        pairs = list(zip(steps[::2], steps[1::2], strict=False))[WARM_UP:]
        # Either kind comes first in every other pair.
        ordered = [sorted(pair, key=lambda step: step.watched) for pair in pairs]
        off, on = zip(*ordered, strict=True)
        parts = [watching_alone(step.parts) for step in on]
        return cls(
            wall=Comparison.of([step.wall for step in on], [step.wall for step in off]),
            cpu=Comparison.of([step.cpu for step in on], [step.cpu for step in off]),
            alone={name: statistics.median(part[name] for part in parts) for name in parts[0]},
        )


def show(cost: Cost, pairs: int) -> None:
    out = Table(title=f"medians of {pairs} pairs of steps")
    out.add_column("")
    out.add_column("ms", justify="right")
    out.add_column("share of a step", justify="right")
    for name, times in (("wall time", cost.wall), ("CPU time", cost.cpu)):
        step = times.not_watched
        out.add_row(f"{name}, watched", f"{1e3 * times.watched:.1f}", "")
        out.add_row(f"{name}, not watched", f"{1e3 * step:.1f}", "")
        share = f"{times.difference / step:.2%} ± {times.error / step:.2%}"
        out.add_row(f"{name}, difference", f"{1e3 * times.difference:.2f}", share)
        out.add_section()
    total = {"watching alone, together": sum(cost.alone.values())}
    for name, seconds in {**cost.alone, **total}.items():
        out.add_row(name, f"{1e3 * seconds:.3f}", f"{seconds / cost.wall.not_watched:.3%}")
    Console().print(out)


def rows(cost: Cost) -> list[Row]:
    """What `--json` writes: a step with watching (ours) against one without."""
    step = cost.wall.not_watched
    cases = {
        "step, wall time": (cost.wall.watched, step),
        "step, CPU time": (cost.cpu.watched, cost.cpu.not_watched),
        "step, watching alone added": (step + sum(cost.alone.values()), step),
    }
    return [make_row(case, ours, peer, "s") for case, (ours, peer) in cases.items()]


def parse_arguments() -> Namespace:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--pairs", type=int, default=60, help="of steps (default %(default)s)")
    add_data_argument(parser, ROOT)
    add_json_argument(parser)
    parser.add_argument("--quick", action="store_true", help="12 pairs of steps of a quarter")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.pairs = 12
    if arguments.pairs < 2:
        parser.error("--pairs has to be at least 2")
    arguments.data = training_data(arguments.data)
    return arguments


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "training.log"
        print(f"{arguments.pairs} pairs of steps ...", file=sys.stderr, flush=True)
        watch = measure(flags(arguments, Path(scratch)), log)
    cost = Cost.of(watch.steps)
    show(cost, arguments.pairs)
    write_rows(arguments.json, rows(cost))


if __name__ == "__main__":
    run_command(main)
