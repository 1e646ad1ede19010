"""Does FP8 train as bf16 does? The tiny preset, 200 steps from one start in each of them.

Over Transformer Engine's Python modules and its FP8 emulated on a CPU (docs/precision.md): the
arithmetic of recipes is compared, not kernels. Fails unless the loss of every recipe ends near that
of bf16. A run that is done is not redone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_trinity.command_line.curves import (
    LOSS,
    TAIL,
    VALIDATION_LOSS,
    add_figure_argument,
    finish,
    is_done,
    markdown,
    note_flags,
    points,
    pyplot,
    running_mean,
    save,
    scalars_of,
    tail_mean,
)
from megatron_trinity.command_line.parser import command_parser
from megatron_trinity.command_line.quickstart import add_data_argument, data_flags, require_data
from megatron_trinity.command_line.rows import Row, add_json_argument, make_row, write_rows
from megatron_trinity.command_line.scalars import Scalars
from megatron_trinity.errors import TrinityError, run_command

EXAMPLE = """example:
  bash examples/quickstart.sh    # prepares the data
  bash tests/run.sh -m te -k roundings    # makes .venv-te
  python benchmarks/fp8_curves.py --figure docs/fp8.svg
"""

ROOT = Path(__file__).resolve().parent.parent
# Okabe and Ito's colours, which colour-blind eyes tell apart; dashes do in grey.
RUNS = {
    "bf16": ("#000000", "-"),
    "fp8-tensorwise": ("#D55E00", ":"),
    "fp8-blockwise": ("#0072B2", "--"),
    "fp8-delayed": ("#009E73", "-."),
}
NEAR = 0.02  # nats that the mean of the last steps may be away from bf16's


@dataclass(frozen=True)
class Plan:
    """What the runs have in common."""

    data: Path
    output: Path
    steps: int

    def run_dir(self, precision: str) -> Path:
        return self.output / f"{self.steps}-steps" / precision

    def flags(self, precision: str) -> list[str]:
        """The trainer's command line."""
        options = {
            "--preset": "tiny",
            "--transformer-impl": "transformer_engine",
            "--precision": precision,
            **data_flags(self.data),
            "--global-batch-size": 8,
            "--train-iters": self.steps,
            "--lr-warmup-iters": self.steps // 10,
            "--lr-wsd-decay-iters": self.steps * 9 // 20,
            "--eval-iters": min(8, self.steps // 10),
            "--eval-global-batch-size": 16,
            "--log-interval": 1,
            "--tensorboard-dir": self.run_dir(precision) / "tensorboard",
        }
        return [str(word) for pair in options.items() for word in pair]


def train(plan: Plan, precision: str) -> None:
    """Run the trainer over the emulation; its output goes into `training.log`.

    Raises:
        TrinityError: it failed, or there is no environment with Transformer Engine.
    """
    packages = next(ROOT.glob(".venv-te/lib/python*/site-packages"), None)
    if packages is None:
        raise TrinityError("there is no .venv-te yet: bash tests/run.sh -m te makes it")
    run_dir = plan.run_dir(precision)
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    log = run_dir / "training.log"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "TRINITY_TEST_TE_PACKAGES": str(packages),
    }
    command = [sys.executable, "-m", "tests.transformer_engine.train", *plan.flags(precision)]
    with log.open("w") as file:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    if done.returncode:
        raise TrinityError(f"the run in {precision} failed; see {log}")
    note_flags(run_dir, plan.flags(precision))


def away(losses: Mapping[int, float], reference: Mapping[int, float]) -> list[float]:
    """Distances, step by step."""
    return [abs(losses[step] - reference[step]) for step in reference]


def table(runs: Mapping[str, Scalars], steps: int) -> str:
    """The figures in Markdown."""
    header = ["precision", "loss", "validation loss", "away from bf16, mean", "and at most"]
    lines = []
    for name, scalars in runs.items():
        gaps = away(scalars[LOSS], runs["bf16"][LOSS])
        values = [tail_mean(scalars[LOSS]), list(scalars[VALIDATION_LOSS].values())[-1]]
        values += [sum(gaps) / len(gaps), max(gaps)]
        lines.append([name, *(f"{value:.4f}" for value in values)])
    title = f"{steps} steps; loss: mean of the last {min(TAIL, steps)}\n\n"
    return title + markdown(header, lines)


def rows(runs: Mapping[str, Scalars]) -> list[Row]:
    """What `--json` writes."""
    measures: dict[str, Callable[[Scalars], float]] = {
        LOSS: lambda scalars: tail_mean(scalars[LOSS]),
        "validation loss": lambda scalars: list(scalars[VALIDATION_LOSS].values())[-1],
    }
    return [
        make_row(f"{what}: {name} against bf16", value(runs[name]), value(runs["bf16"]), "nats")
        for name in runs
        if name != "bf16"
        for what, value in measures.items()
    ]


def draw(runs: Mapping[str, Scalars], figure: Path) -> None:
    """Losses against steps above, and how far those of FP8 are from bf16's below."""
    plt = pyplot("fp8")
    canvas, (above, below) = plt.subplots(
        2, 1, figsize=(7.2, 5.4), layout="constrained", sharex=True, height_ratios=(3, 2)
    )
    reference = runs["bf16"][LOSS]
    for name, (colour, dashes) in RUNS.items():
        losses = runs[name][LOSS]
        gaps = {step: losses[step] - reference[step] for step in reference}
        for axes, curve in ((above, losses), (below, gaps)):
            if axes is above or name != "bf16":
                means = points(running_mean(curve))
                axes.plot(*means, color=colour, ls=dashes, linewidth=1.8, label=name)
    below.axhline(0.0, color=RUNS["bf16"][0], linewidth=0.8)
    above.set_ylabel("loss")
    below.set_ylabel("loss - loss in bf16")
    below.set_xlabel("step")
    above.legend(frameon=False, handlelength=3)
    finish(above)
    finish(below)
    save(canvas, figure)


def check_near(runs: Mapping[str, Scalars]) -> None:
    """Raises: TrinityError, with the figures, unless all end near bf16."""
    ends = {name: tail_mean(scalars[LOSS]) for name, scalars in runs.items()}
    if any(abs(end - ends["bf16"]) > NEAR for end in ends.values()):
        raise TrinityError(f"losses at the end are more than {NEAR:g} apart: {ends}")


def parse_arguments() -> Namespace:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--steps", type=int, default=200, help="of each run (default %(default)s)")
    add_data_argument(parser, ROOT)
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "runs" / "fp8_curves",
        help="folder of the runs (default runs/fp8_curves)",
    )
    add_figure_argument(parser, "the losses")
    add_json_argument(parser)
    parser.add_argument("--quick", action="store_true", help="ten steps a run: shows that it works")
    arguments = parser.parse_args()
    if arguments.steps < 10:
        parser.error("--steps has to be at least 10")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    require_data(arguments.data, "tokenizer", "data_train.bin", "data_valid.bin")
    steps = 10 if arguments.quick else arguments.steps
    plan = Plan(arguments.data.resolve(), arguments.output.resolve(), steps)
    for name in RUNS:
        if is_done(plan.run_dir(name), plan.flags(name), steps):
            print(f"{name}: done already, in {plan.run_dir(name)}", file=sys.stderr, flush=True)
        else:
            print(f"{name}: {steps} steps", file=sys.stderr, flush=True)
            train(plan, name)
    runs = {name: scalars_of(plan.run_dir(name)) for name in RUNS}
    print(table(runs, steps))
    write_rows(arguments.json, rows(runs))
    if arguments.figure:
        draw(runs, arguments.figure)
    check_near(runs)


if __name__ == "__main__":
    run_command(main)
