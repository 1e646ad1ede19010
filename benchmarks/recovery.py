"""How long is a run without a step when a rank is killed? From the kill to the next applied step.

The real trainer with the tiny preset under `torchrun --max-restarts`, a save every few steps. A
rank is killed by SIGKILL behind a save; torchrun ends the others and starts all anew. Start-up is
from rank 0's first line to the end of its first step, without the time for loading.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_trinity.command_line.parser import command_parser
from megatron_trinity.command_line.quickstart import add_data_argument, data_flags, training_data
from megatron_trinity.command_line.rows import add_json_argument, make_row, write_rows
from megatron_trinity.errors import TrinityError, run_command

EXAMPLE = """example:
  bash examples/quickstart.sh    # prepares the data
  python benchmarks/recovery.py --kills 5
"""

ROOT = Path(__file__).resolve().parent.parent
EVENTS = "TRINITY_RECOVERY_EVENTS"
"""Variable that tells a rank which file its events go to."""
SAVE_INTERVAL, LIMIT = 5, 300.0
PARTS = (
    "the other ranks end",
    "torchrun starts them anew",
    "the checkpoint is loaded",
    "start-up, first step included",
    "all but start-up",
)


@dataclass(frozen=True)
class Event:
    """Something that happened to a rank: when, by the clock, and in which iteration."""

    what: str
    when: float
    rank: int
    pid: int
    iteration: int = 0


def rank() -> None:
    """What `pretrain_trinity.py` does, with its events noted."""
    path = os.environ[EVENTS]

    def note(what: str, iteration: int = 0) -> None:
        row = (what, time.time(), int(os.environ["RANK"]), os.getpid(), iteration)
        with open(path, "a") as stream:
            stream.write(json.dumps(row) + "\n")

    note("begins")
    from megatron_trinity.training.stop import stopping

    with stopping():
        from megatron_trinity.upstream import adapt_megatron

        adapt_megatron()

        from megatron.training import training

        from megatron_trinity.training import pretrain

        class Observer(pretrain.StepObserver):
            def step_ended(self, *args: Any) -> None:
                super().step_ended(*args)
                note("step", self._iteration)

        load = training.load_checkpoint

        def loading(*args: Any, **kwargs: Any) -> Any:
            note("loads")
            result = load(*args, **kwargs)
            note("loaded")
            return result

        training.load_checkpoint = loading
        pretrain.StepObserver = Observer  # type: ignore[misc]
        pretrain.pretrain()


class Run:
    """A launch, and the events of its ranks."""

    def __init__(self, folder: Path, data: Path, ranks: int, kills: int) -> None:
        self._events = folder / "events"
        self._events.touch()
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        words += ["--max-restarts", str(kills), str(Path(__file__).resolve())]
        options = {
            "--preset": "tiny",
            **data_flags(data),
            "--global-batch-size": 8,
            "--micro-batch-size": 4,
            "--train-iters": 1_000_000,
            "--lr-warmup-iters": 0,
            "--eval-iters": 0,
            "--save": folder / "run",
            "--load": folder / "run",
            "--save-interval": SAVE_INTERVAL,
            "--keep-last-checkpoints": 2,
        }
        words += [str(word) for pair in options.items() for word in pair]
        self._log = (folder / "log").open("w")
        told = {EVENTS: str(self._events), "PYTHONPATH": str(ROOT)}
        self._launcher = subprocess.Popen(
            words, env=os.environ | told, stdout=self._log, stderr=subprocess.STDOUT, cwd=ROOT
        )

    def events(self) -> list[Event]:
        lines = self._events.read_text().splitlines()
        return [Event(*json.loads(line)) for line in lines if line.endswith("]")]

    def first(self, since: float, **wanted: object) -> Event:
        """The first event of rank 0 since then that is as wanted; waits for it.

        Raises:
            TrinityError: it does not come.
        """
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline and self._launcher.poll() is None:
            for event in self.events():
                known = vars(event)
                if event.when > since and event.rank == 0 and wanted.items() <= known.items():
                    return event
            time.sleep(0.05)
        raise TrinityError(f"the run came to no {wanted}: see {self._log.name}")

    def kill(self, rank: int) -> float:
        """Kill the newest process of that rank; when."""
        pid = [event.pid for event in self.events() if event.rank == rank][-1]
        when = time.time()
        os.kill(pid, signal.SIGKILL)
        return when

    def close(self) -> None:
        self._launcher.terminate()
        try:
            self._launcher.wait(60)
        except subprocess.TimeoutExpired:
            self._launcher.kill()
        self._log.close()


def recovery(run: Run, ranks: int, since: float) -> tuple[list[float], float]:
    """Kill the last rank behind the first save of rank 0's process since then.

    Returns: seconds by part, and a time before which that process was the newest.
    """
    began = run.first(since, what="begins")
    run.first(began.when, what="step", iteration=_next_save(run, began.when) + 1)
    killed = run.kill(ranks - 1)
    while is_running(began.pid):
        time.sleep(0.01)
    ended = time.time()
    again = run.first(killed, what="begins")
    loads, loaded = run.first(killed, what="loads"), run.first(killed, what="loaded")
    back = run.first(loaded.when, what="step")
    loading = loaded.when - loads.when
    startup = back.when - again.when - loading
    parts = [ended - killed, again.when - ended, loading, startup]
    return [*parts, back.when - killed - startup], killed


def is_running(pid: int) -> bool:
    """Whether there is such a process; torchrun waits for those of its that have ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _next_save(run: Run, since: float) -> int:
    iteration = run.first(since, what="step").iteration
    return (iteration // SAVE_INTERVAL + 1) * SAVE_INTERVAL


def show(medians: Sequence[float], most: Sequence[float], kills: int) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Table(title=f"seconds from the kill of a rank to the next step, of {kills} kills")
    for column in ("", "median", "most"):
        out.add_column(column, justify="right" if column else "left")
    for name, *values in zip(PARTS, medians, most, strict=True):
        out.add_row(name, *(f"{value:.2f}" for value in values))
    Console().print(out)


def parse_arguments() -> Namespace:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--kills", type=int, default=5, help="default %(default)s")
    parser.add_argument(
        "--ranks", type=int, default=2, help="on this machine (default %(default)s)"
    )
    add_data_argument(parser, ROOT)
    add_json_argument(parser)
    parser.add_argument("--quick", action="store_true", help="one kill")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.kills = 1
    if arguments.kills < 1 or arguments.ranks < 2:
        parser.error("--kills has to be at least 1, --ranks 2")
    arguments.data = training_data(arguments.data)
    return arguments


def main() -> None:
    if EVENTS in os.environ:
        rank()
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments = parse_arguments()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), arguments.data, arguments.ranks, arguments.kills)
        try:
            since = 0.0
            for _ in range(arguments.kills):
                parts, since = recovery(run, arguments.ranks, since)
                found.append(parts)
                print(" ".join(f"{n}: {s:.2f}" for n, s in zip(PARTS, parts, strict=True)))
        finally:
            run.close()
    by_part = list(zip(*found, strict=True))
    medians = [statistics.median(values) for values in by_part]
    show(medians, [max(values) for values in by_part], arguments.kills)
    write_rows(
        arguments.json,
        [make_row(name, value, None, "s") for name, value in zip(PARTS, medians, strict=True)],
    )


if __name__ == "__main__":
    run_command(main)
