"""How long does a start take, and of what? From torchrun to the end of the first step, by part.

The real trainer with the tiny preset, started again and again, in two ways by turns: as it is, and
with what its start leaves out: the look for garbage among what imports make, the libraries of
tokenizers that Megatron imports for any tokenizer, and the YAML reader written in Python. Seconds
are those of the CPU in rank 0, which neighbours on a busy machine disturb less; those of the clock
beside them. `--files` counts the calls of rank 0 that name a file, which a shared file system has
to answer, by strace.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_trinity.command_line.parser import command_parser, require_at_least_one
from megatron_trinity.command_line.quickstart import add_data_argument, data_flags, training_data
from megatron_trinity.command_line.rows import Row, add_json_argument, make_row, write_rows
from megatron_trinity.errors import TrinityError, run_command

EXAMPLE = """example:
  bash examples/quickstart.sh    # prepares the data
  python benchmarks/startup.py --starts 5
"""

ROOT = Path(__file__).resolve().parent.parent
MARKS, WAY = "TRINITY_STARTUP_MARKS", "TRINITY_STARTUP_WAY"
"""Variables that tell a rank: the file for its marks, and how it starts."""

WAYS = ("as it is", "as it was")
PARTS = (
    "torchrun, up to the ranks",
    "import of torch",
    "import of megatron-core, adapted",
    "import of the trainer",
    "arguments",
    "tokenizer",
    "process groups, data",
    "model and optimizer",
    "first step",
)

ALL = (*PARTS, "together")

Marks = list[tuple[float, float]]
"""Clock and CPU seconds at the end of each of `PARTS`."""


class Marker:
    """Notes when each part has ended, and writes all of them behind the last one."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._marks: Marks = []

    def __call__(self) -> None:
        self._marks.append((time.time(), time.process_time()))
        if len(self._marks) == len(PARTS) and os.environ["RANK"] == "0":
            self._file.write_text(json.dumps(self._marks))


def rank() -> None:
    """What `pretrain_trinity.py` does, with marks."""
    import gc

    mark = Marker(Path(os.environ[MARKS]))
    mark()
    as_it_was = os.environ[WAY] == WAYS[1]
    if not as_it_was:
        gc.disable()
    import torch  # noqa: F401

    mark()
    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()
    mark()
    from megatron_trinity.training import pretrain

    if not as_it_was:
        gc.freeze()
        gc.enable()
    mark()
    if as_it_was:
        _put_back()
    _mark_within(pretrain, mark)
    pretrain.pretrain()


def _put_back() -> None:
    import yaml
    from megatron.training import global_vars

    from megatron_trinity.arguments import presets

    global_vars.build_tokenizer = global_vars.build_tokenizer.__wrapped__
    presets.LOADER = yaml.SafeLoader


def _mark_within(pretrain: Any, mark: Marker) -> None:
    """Behind the arguments, the tokenizer, the data, the model, and the first step."""

    def marked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            mark()
            return result

        return call

    from megatron.training import training

    class Observer(pretrain.StepObserver):
        step_ended = marked(pretrain.StepObserver.step_ended)

    pretrain.parse_arguments = marked(pretrain.parse_arguments)
    pretrain.set_global_variables = marked(pretrain.set_global_variables)
    pretrain.StepObserver = Observer
    setup = training.setup_model_and_optimizer

    def setting_up(*args: Any, **kwargs: Any) -> Any:
        mark()
        return marked(setup)(*args, **kwargs)

    training.setup_model_and_optimizer = setting_up


def flags(data: Path) -> list[str]:
    options = {
        "--preset": "tiny",
        **data_flags(data),
        "--train-iters": 1,
        "--lr-warmup-iters": 0,
        "--eval-iters": 0,
    }
    return [str(word) for pair in options.items() for word in pair]


def command(ranks: int, data: Path) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*launcher, str(Path(__file__).resolve()), *flags(data)]


def start(words: Sequence[str], way: str, scratch: Path) -> tuple[float, Marks]:
    """When it was started, and the marks of rank 0.

    Raises:
        TrinityError: it has not come to the end of its first step.
    """
    file = scratch / "marks.json"
    file.unlink(missing_ok=True)
    began = time.time()
    told = {MARKS: str(file), WAY: way, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=os.environ | told, capture_output=True, text=True, cwd=ROOT)
    if not file.exists():
        raise TrinityError(f"a start failed: {done.stderr[-2000:]}")
    return began, [(clock, cpu) for clock, cpu in json.loads(file.read_text())]


def parts(began: float, marks: Marks) -> tuple[list[float], list[float]]:
    """Seconds of the clock and of rank 0's CPU, by part. What is before its first line is Python's
    and torchrun's."""
    clocks, cpus = zip(*marks, strict=True)
    return (
        [after - before for before, after in zip([began, *clocks], clocks, strict=False)],
        [after - before for before, after in zip([0.0, *cpus], cpus, strict=False)],
    )


def count_files(data: Path, way: str, scratch: Path) -> Counter[str]:
    """Calls of a rank, alone in its run, that name a file: those that find it, and the others."""
    trace = scratch / "trace"
    strace = ["strace", "-ff", "-qq", "-e", "trace=%file", "-e", "signal=none", "-o", str(trace)]
    for old in scratch.glob("trace.*"):
        old.unlink()
    start([*strace, *command(1, data)], way, scratch)
    found: Counter[str] = Counter()
    for file in scratch.glob("trace.*"):  # one a thread
        lines = file.read_text(errors="replace").splitlines()
        if not any(line.startswith("execve(") and '"-u"' in line for line in lines):
            continue  # not a rank's main thread
        for line in lines:
            if ', "", ' in line:  # asks about a file that is open already
                continue
            found["absent" if "ENOENT" in line else "found"] += 1
            found["opened"] += line.startswith("open") and " = -1 " not in line
    return found


def show(
    clock: Mapping[str, Sequence[float]], cpu: Mapping[str, Sequence[float]], starts: int
) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Table(title=f"seconds, medians of {starts} starts each")
    out.add_column("")
    for what in ("CPU", "clock"):
        for way in WAYS:
            out.add_column(f"{what},\n{way}", justify="right")
    for number, name in enumerate(ALL):
        if number == len(PARTS):
            out.add_section()
        out.add_row(name, *(f"{of[way][number]:.2f}" for of in (cpu, clock) for way in WAYS))
    Console().print(out)


def medians(runs: Sequence[Sequence[float]]) -> list[float]:
    """Of each part, and of all together."""
    whole = [[*run, sum(run)] for run in runs]
    return [statistics.median(values) for values in zip(*whole, strict=True)]


def parse_arguments() -> Namespace:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--starts", type=int, default=5, help="of each way (default %(default)s)")
    parser.add_argument(
        "--ranks", type=int, default=2, help="on this machine (default %(default)s)"
    )
    parser.add_argument("--files", action="store_true", help="count calls to the file system too")
    add_data_argument(parser, ROOT)
    add_json_argument(parser)
    parser.add_argument("--quick", action="store_true", help="one start of each way, of one rank")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.starts = arguments.ranks = 1
    require_at_least_one("--starts", arguments.starts)
    require_at_least_one("--ranks", arguments.ranks)
    if arguments.files and not shutil.which("strace"):
        parser.error("--files needs strace, which is not installed")
    arguments.data = training_data(arguments.data)
    return arguments


def main() -> None:
    if MARKS in os.environ:
        rank()
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments = parse_arguments()
    words = command(arguments.ranks, arguments.data)
    rows: list[Row] = []
    runs: dict[str, list[tuple[list[float], list[float]]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.starts):
            for way in WAYS[:: 1 if number % 2 else -1]:
                runs[way].append(parts(*start(words, way, Path(folder))))
        clock, cpu = (
            {way: medians([run[which] for run in runs[way]]) for way in WAYS} for which in (0, 1)
        )
        show(clock, cpu, arguments.starts)
        for unit, of in (("s of the CPU", cpu), ("s", clock)):
            for case, now, before in zip(ALL, *(of[way] for way in WAYS), strict=True):
                rows.append(make_row(case, now, before, unit))
        if arguments.files:
            is_, was = (count_files(arguments.data, way, Path(folder)) for way in WAYS)
            for what in ("found", "absent", "opened"):
                print(f"calls, files {what}: {is_[what]} {WAYS[0]}, {was[what]} {WAYS[1]}")
                rows.append(make_row(f"files {what}", is_[what], was[what], "calls"))
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    run_command(main)
