"""Does the document buffer calm training? Batch heterogeneity and the kurtosis of gradient norms.

The tiny preset on source files of installed packages, whose lengths are skewed: documents one
behind the other in order, the same samples shuffled, and the Random Sequential Document Buffer.
Each reads the same number of tokens, with documents kept apart and a sequence a micro-batch. Runs
of a seed start from the same weights. A run that is done is not redone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pvariance

from megatron_trinity.command_line.curves import (
    LOSS,
    add_figure_argument,
    finish,
    is_done,
    markdown,
    note_flags,
    pyplot,
    save,
    scalars_of,
)
from megatron_trinity.command_line.parser import command_parser
from megatron_trinity.command_line.rows import add_json_argument, make_row, write_rows
from megatron_trinity.errors import TrinityError, run_command

EXAMPLE = """example:
  python benchmarks/rsdb.py --steps 300 --seeds 1 2 3 --figure docs/document_buffer.svg
"""

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("numpy", "sympy", "networkx", "mpmath")
CASES: Mapping[str, tuple[str, ...]] = {
    "in-order": (),
    "sequential": (),
    "document-buffer": ("--document-buffer-size", "64", "--document-buffers", "4"),
}
COLOURS = {"in-order": "#D55E00", "sequential": "#0072B2", "document-buffer": "#009E73"}
HETEROGENEITY, GRAD_NORM = "batch heterogeneity", "grad-norm"
WARM_UP = 20  # steps that are left out: the norm falls there whatever is read


def kurtosis(values: Sequence[float]) -> float:
    """The fourth standardized moment: 3 for a normal distribution."""
    mean = fmean(values)
    variance = fmean((value - mean) ** 2 for value in values)
    return fmean((value - mean) ** 4 for value in values) / variance**2


def unrest(losses: Sequence[float]) -> float:
    """Variance of the change of the loss from one step to the next."""
    return pvariance([after - before for before, after in pairwise(losses)])


def prepare(output: Path) -> None:
    """Tokenizer and dataset in `output`; nothing is done twice."""
    packages = [Path(sysconfig.get_path("purelib")) / name for name in PACKAGES]
    sources = [str(path) for path in packages if path.is_dir()]
    common = ["--source", *sources, "--glob", "**/*.py", "--valid-fraction", "0.01"]
    tokenizer, data = str(output / "tokenizer"), str(output / "data")
    _run("tools/train_tokenizer.py", *common, "--vocab-size", "2048", "--output", tokenizer)
    _run("tools/prepare_data.py", *common, "--tokenizer", tokenizer, "--output", data)


def train(output: Path, case: str, seed: int, steps: int) -> dict[str, list[float]]:
    """The scalars of a run, a value a step."""
    run = output / f"{steps}-steps" / f"{case}-{seed}"
    options = {
        "--preset": "tiny",
        "--tokenizer-model": output / "tokenizer",
        "--train-data-path": output / "data_train",
        "--packing": case,
        "--seed": seed,
        "--micro-batch-size": 1,
        "--global-batch-size": 16,
        "--train-iters": steps,
        "--lr-warmup-iters": WARM_UP,
        "--log-interval": 1,
        "--eval-iters": 0,
        "--num-workers": 0,
        "--tensorboard-dir": run / "tensorboard",
    }
    flags = [str(word) for pair in options.items() for word in pair]
    flags += ["--dataloader-inter-document-masking", *CASES[case]]
    if not is_done(run, flags, steps, last=LOSS):
        print(f"{case}, seed {seed}", file=sys.stderr, flush=True)
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")
        _run(*launcher, "pretrain_trinity.py", *flags)
        note_flags(run, flags)
    scalars = scalars_of(run)
    return {name: list(scalars[name].values()) for name in (HETEROGENEITY, GRAD_NORM, LOSS)}


def _run(*words: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        told = (done.stderr + done.stdout).splitlines()
        errors = [line for line in told if line.startswith("error")] or told[-3:]
        raise TrinityError(f"{' '.join(words[:6])} failed: {' '.join(errors)}")


Run = Mapping[str, Sequence[float]]
MEASURES: Mapping[str, Callable[[Run], float]] = {
    "batch heterogeneity, nats": lambda run: fmean(run[HETEROGENEITY][WARM_UP:]),
    "kurtosis of the gradient norm": lambda run: kurtosis(run[GRAD_NORM][WARM_UP:]),
    "variance of the loss from step to step": lambda run: unrest(run[LOSS][WARM_UP:]),
}


def draw(runs: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], figure: Path) -> None:
    """Heterogeneity and gradient norm of the first seed against steps."""
    canvas, both = pyplot("rsdb").subplots(2, figsize=(7.2, 5.4), sharex=True, layout="constrained")
    for axes, name in zip(both, (HETEROGENEITY, GRAD_NORM), strict=True):
        for case, of_seeds in runs.items():
            values = of_seeds[0][name][WARM_UP:]
            steps = range(WARM_UP + 1, WARM_UP + 1 + len(values))
            axes.plot(steps, values, color=COLOURS[case], linewidth=1, label=case)
        axes.set_ylabel(name)
        finish(axes)
    both[0].legend(frameon=False, ncols=3)
    both[1].set_xlabel("step")
    save(canvas, figure)


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--steps", type=int, default=300, help="of each run (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "rsdb")
    add_figure_argument(parser, "the first seed")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed")
    add_json_argument(parser)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps, arguments.seeds = WARM_UP + 4, arguments.seeds[:1]
    if arguments.steps < WARM_UP + 4:
        parser.error(f"--steps has to be at least {WARM_UP + 4}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    output = arguments.output.resolve()
    prepare(output)
    runs: dict[str, list[dict[str, list[float]]]] = {case: [] for case in CASES}
    for seed in arguments.seeds:
        for case in CASES:
            runs[case].append(train(output, case, seed, arguments.steps))
    lines = []
    means: dict[str, list[float]] = {}
    for case, of_seeds in runs.items():
        figures = [[measure(run) for run in of_seeds] for measure in MEASURES.values()]
        means[case] = [fmean(values) for values in figures]
        cells = (" ".join(f"{value:.3g}" for value in values) for values in figures)
        lines.append([case, *cells])
    print(markdown(["packing", *MEASURES], lines), end="")
    rows = [
        make_row(f"{name}: buffer against {peer}", ours, means[peer][number], "")
        for number, (name, ours) in enumerate(zip(MEASURES, means["document-buffer"], strict=True))
        for peer in ("in-order", "sequential")
    ]
    write_rows(arguments.json, rows)
    if arguments.figure:
        draw(runs, arguments.figure)


if __name__ == "__main__":
    run_command(main)
