"""Does balancing balance? The tiny preset, trained from one start without it and by each rule.

Three runs on two ranks with expert parallelism 2, alike in all but --load-balancing. What is
compared comes from TensorBoard's files. Fails unless both rules end with a max violation three
times below that of no balancing. A run that is done is not redone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

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
  python benchmarks/balancing.py --steps 600 --figure docs/balancing.svg
"""

ROOT = Path(__file__).resolve().parent.parent
# Okabe and Ito's colours, which colour-blind eyes tell apart; dashes do in grey.
RULES = {
    "none": ("no balancing", "#D55E00", ":"),
    "sign": ("sign rule", "#0072B2", "--"),
    "smebu": ("SMEBU", "#009E73", "-"),
}
MAX_VIOLATION, ENTROPY = "max violation", "load entropy"
NEEDED = 3.0  # how much smaller than without balancing the max violation has to become
SEQUENCE, EVAL_BATCH = 256, 16  # tokens; sequences, as the quickstart evaluates


@dataclass(frozen=True)
class Plan:
    """What the three runs have in common."""

    data: Path
    output: Path
    steps: int
    global_batch: int
    eval_iters: int

    def run_dir(self, rule: str) -> Path:
        return self.output / f"{self.steps}-steps" / rule

    def flags(self, rule: str) -> list[str]:
        """The trainer's command line."""
        options = {
            "--preset": "tiny",
            "--load-balancing": rule,
            **data_flags(self.data),
            "--global-batch-size": self.global_batch,
            "--train-iters": self.steps,
            "--lr-warmup-iters": min(20, self.steps // 4),
            "--lr-wsd-decay-iters": self.steps * 9 // 20,
            "--expert-model-parallel-size": 2,
            "--eval-iters": self.eval_iters,
            "--eval-global-batch-size": EVAL_BATCH,
            "--tensorboard-dir": self.run_dir(rule) / "tensorboard",
        }
        return [str(word) for pair in options.items() for word in pair]


@dataclass(frozen=True)
class Outcome:
    """A run's figures: means over its last steps, and the validation loss behind the last."""

    max_violation: float
    by_layer: Mapping[str, float]  # "layer 02" to max violation
    entropy: float
    loss: float
    validation_loss: float

    @classmethod
    def of(cls, scalars: Scalars) -> Outcome:
        prefix = MAX_VIOLATION + "/"
        return cls(
            max_violation=tail_mean(scalars[MAX_VIOLATION]),
            by_layer={
                name.removeprefix(prefix): tail_mean(scalars[name])
                for name in sorted(scalars)
                if name.startswith(prefix)
            },
            entropy=tail_mean(scalars[ENTROPY]),
            loss=tail_mean(scalars[LOSS]),
            validation_loss=list(scalars[VALIDATION_LOSS].values())[-1],
        )


def validation_batches(data: Path) -> int:
    """Whole batches in the validation split of the quickstart's data.

    Raises:
        UsageError: the data is not there.
    """
    splits = (f"data_{split}.{end}" for split in ("train", "valid") for end in ("bin", "idx"))
    require_data(data, "data.json", "tokenizer", *splits)
    tokens = json.loads((data / "data.json").read_text())["splits"]["valid"]["tokens"]
    return int(tokens - 1) // SEQUENCE // EVAL_BATCH


def train(plan: Plan, rule: str) -> None:
    """Run the trainer; its output goes into `training.log`.

    Raises:
        TrinityError: it failed.
    """
    run_dir = plan.run_dir(rule)
    if run_dir.exists():
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True)
    note_flags(run_dir, plan.flags(rule))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node=2", "pretrain_trinity.py", *plan.flags(rule)]
    log = run_dir / "training.log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
        Progress(disable=not sys.stderr.isatty(), console=Console(stderr=True)) as progress,
    ):
        assert process.stdout is not None
        name = RULES[rule][0]
        task = progress.add_task(name, total=plan.steps)
        for line in process.stdout:
            file.write(line)
            file.flush()
            found = re.match(r" +(\d+)/\d+ ", line)
            if found:
                step = int(found[1])
                progress.update(task, completed=step)
                if progress.disable and step % 50 == 0:
                    print(f"{name}: step {step} of {plan.steps}", file=sys.stderr, flush=True)
    if process.returncode:
        errors = [line for line in log.read_text().splitlines() if line.startswith("error")]
        reason = errors[0] if errors else f"exit code {process.returncode}"
        raise TrinityError(f"the run with {name} failed: {reason}; see {log}")


def check_same_start(runs: Mapping[str, Scalars]) -> None:
    """The first step's loss and load do not know of balancing yet: they have to be the same.

    Raises:
        TrinityError: they are not.
    """
    for name in (LOSS, ENTROPY):
        first = {rule: scalars[name][1] for rule, scalars in runs.items()}
        if len(set(first.values())) > 1:
            raise TrinityError(f"the runs do not start alike: {name} of step 1 is {first}")


def table(outcomes: Mapping[str, Outcome], steps: int) -> str:
    """The figures in Markdown."""
    layers = list(outcomes["none"].by_layer)
    header = ["run", MAX_VIOLATION, *layers, ENTROPY, LOSS, "validation loss"]
    lines = []
    for rule, outcome in outcomes.items():
        values = [outcome.max_violation, *(outcome.by_layer[layer] for layer in layers)]
        values += [outcome.entropy, outcome.loss, outcome.validation_loss]
        lines.append([RULES[rule][0], *(f"{value:.3f}" for value in values)])
    title = f"{steps} steps; means of the last {min(TAIL, steps)}, validation loss at the end\n\n"
    return title + markdown(header, lines)


def rows(outcomes: Mapping[str, Outcome]) -> list[Row]:
    """What `--json` writes."""
    result: list[Row] = []

    def add(ours: str, peer: str, measure: str, unit: str, values: tuple[float, float]) -> None:
        case = f"{measure}: {RULES[ours][0]} against {RULES[peer][0]}"
        result.append(make_row(case, *values, unit, more_is_better=measure == ENTROPY))

    for ours, peer in (("sign", "none"), ("smebu", "none"), ("smebu", "sign")):
        a, b = outcomes[ours], outcomes[peer]
        add(ours, peer, MAX_VIOLATION, "of the mean load", (a.max_violation, b.max_violation))
        for layer, value in a.by_layer.items():
            measure = f"{MAX_VIOLATION}, {layer}"
            add(ours, peer, measure, "of the mean load", (value, b.by_layer[layer]))
        add(ours, peer, ENTROPY, "nats", (a.entropy, b.entropy))
        add(ours, peer, LOSS, "nats", (a.loss, b.loss))
        add(ours, peer, VALIDATION_LOSS, "nats", (a.validation_loss, b.validation_loss))
    return result


def draw(runs: Mapping[str, Scalars], figure: Path) -> None:
    """Max violation against steps, thin, and its running mean, thick."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    plt = pyplot("balancing")
    canvas, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for rule, (label, colour, dashes) in RULES.items():
        curve = runs[rule][MAX_VIOLATION]
        axes.plot(*points(curve), color=colour, linewidth=0.6, alpha=0.4)
        means = running_mean(curve)
        axes.plot(*points(means), color=colour, ls=dashes, linewidth=2.0, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("step")
    axes.set_ylabel("max violation of the worst layer")
    axes.legend(frameon=False, handlelength=3)
    finish(axes)
    save(canvas, figure)


def check_balanced(outcomes: Mapping[str, Outcome]) -> None:
    """Raises: TrinityError, with the figures, unless both rules beat no balancing by `NEEDED`."""
    without = outcomes["none"].max_violation
    failed = [
        f"{RULES[rule][0]} ends at {outcomes[rule].max_violation:.3f}"
        for rule in ("sign", "smebu")
        if outcomes[rule].max_violation * NEEDED > without
    ]
    if failed:
        raise TrinityError(
            f"max violation is not {NEEDED:g} times below that of no balancing ({without:.3f}): "
            + ", ".join(failed)
        )


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--steps", type=int, default=600, help="of each run (default %(default)s)")
    add_data_argument(parser, ROOT)
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "runs" / "balancing",
        help="folder of the runs (default runs/balancing)",
    )
    add_figure_argument(parser, "max violation")
    add_json_argument(parser)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="four small steps a run: shows that all of it works, and checks no figure",
    )
    arguments = parser.parse_args(argv)
    if arguments.steps < TAIL:
        parser.error(f"--steps has to be at least {TAIL}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    plan = Plan(
        data=arguments.data.resolve(),
        output=arguments.output.resolve(),
        steps=arguments.steps,
        global_batch=32,
        eval_iters=validation_batches(arguments.data),
    )
    if arguments.quick:
        plan = replace(plan, steps=4, global_batch=16, eval_iters=1)
    for rule, (name, *_) in RULES.items():
        if is_done(plan.run_dir(rule), plan.flags(rule), plan.steps):
            print(f"{name}: done already, in {plan.run_dir(rule)}", file=sys.stderr, flush=True)
        else:
            train(plan, rule)
    runs = {rule: scalars_of(plan.run_dir(rule)) for rule in RULES}
    check_same_start(runs)
    outcomes = {rule: Outcome.of(scalars) for rule, scalars in runs.items()}
    print(table(outcomes, plan.steps))
    write_rows(arguments.json, rows(outcomes))
    if arguments.figure:
        draw(runs, arguments.figure)
    if not arguments.quick:
        check_balanced(outcomes)


if __name__ == "__main__":
    run_command(main)
