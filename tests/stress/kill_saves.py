"""Kill training at random moments, most of them around its saves, and start it again.

    python -m tests.stress.kill_saves --kills 100

Whatever the moment, the next start has to go on from the newest whole checkpoint, and each of its
steps has to have the losses and the gradient norm of a run that was never killed, bit by bit.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from megatron_trinity.checkpoint.iterations import iterations, number_of
from megatron_trinity.errors import TrinityError
from tests.checkpoints import check_whole
from tests.distributed.pool import RankError, RankPool
from tests.steps import recorded, run_recorded
from tests.stress.options import options_parser
from tests.trainer import training_flags, write_dataset

STEPS = 8
TIMEOUT = 300.0  # seconds
ANYWHERE = 2.0  # seconds in which a start, and some steps after it, fall
IN_A_SAVE = 0.05  # seconds after a save has begun
POINTER = "latest_checkpointed_iteration.txt"
FOREGROUND, BACKGROUND, RANK_FILES = (), ("--async-save",), ("--ckpt-format", "torch")
MODES = [
    *((ranks, flags) for ranks in (1, 2) for flags in (FOREGROUND, BACKGROUND)),
    (2, RANK_FILES),
]
"""Ranks, and flags of how they save."""

Killed = Counter[str]
"""Where kills fell: `inside` of a save, `pointer` for between its manifest and its pointer, or
`outside`."""


def newest_whole(run: Path) -> int:
    """The newest iteration that a start has to load; 0 if there is none."""
    for path in iterations(run):
        try:
            check_whole(path, checksums=True)
        except TrinityError:
            continue
        return number_of(path)
    return 0


@dataclass
class Campaign:
    """Kills of one kind of run.

    Attributes:
        folder: of the data, and of files that it makes.
        world_size: ranks.
        flags: of how they save.
        killed: where the kills fell.
    """

    folder: Path
    world_size: int
    flags: tuple[str, ...]
    seed: int
    killed: Killed = field(default_factory=Counter)

    def __post_init__(self) -> None:
        name = " ".join([str(self.world_size), *self.flags])
        self._random = random.Random(f"{self.seed} {name}")
        self._run, self._steps = self.folder / f"run {name}", self.folder / f"steps {name}"
        # One for both: how a run saves changes none of its steps.
        reference = self.folder / f"reference {self.world_size}"
        if not reference.exists():
            with self._start(self.folder / f"whole {self.world_size}", reference) as (_, future):
                assert future.result() == [0] * self.world_size
        self._reference = dict(recorded(reference))
        assert list(self._reference) == list(range(1, STEPS + 1))

    def kill(self, number: int) -> None:
        """Start training, kill it, and say where; until `number` kills have been done."""
        while self.killed.total() < number:
            before, unfinished = newest_whole(self._run), self._unfinished()
            known, seen = set(iterations(self._run)), len(recorded(self._steps))
            with self._start(self._run, self._steps) as (pids, future):
                wait = self._in_a_save if self._random.random() < 0.7 else self._anywhere
                wait(known, future)
                ended = future.done()
                for pid in pids:
                    os.killpg(pid, signal.SIGKILL)
                with contextlib.nullcontext() if ended else contextlib.suppress(RankError):
                    assert future.result() == [0] * self.world_size
            self._check(before, recorded(self._steps)[seen:])
            self._check_nothing_lost(before, recorded(self._steps)[seen:])
            if ended:
                assert newest_whole(self._run) == STEPS
                shutil.rmtree(self._run)
            else:
                self.killed[self._where(unfinished)] += 1

    def finish(self) -> None:
        """Start once more, and train to the end."""
        before, seen = newest_whole(self._run), len(recorded(self._steps))
        with self._start(self._run, self._steps) as (_, future):
            assert future.result() == [0] * self.world_size
        steps = recorded(self._steps)[seen:]
        self._check(before, steps)
        assert [number for number, _ in steps] == list(range(before + 1, STEPS + 1))
        assert newest_whole(self._run) == STEPS
        assert (self._run / POINTER).read_text() == str(STEPS)

    def _check(self, before: int, steps: list[tuple[int, str]]) -> None:
        for place, (number, values) in enumerate(steps):
            assert number == before + 1 + place, f"step {number} after {before} and {place} steps"
            assert values == self._reference[number], f"step {number} has other values"

    def _check_nothing_lost(self, before: int, steps: list[tuple[int, str]]) -> None:
        """When a step has ended, that before it is saved; in the background, that before this."""
        unsaved = 2 if self.flags == BACKGROUND else 1
        last = steps[-1][0] if steps else before
        newest = newest_whole(self._run)
        assert newest >= max(before, last - unsaved), f"{newest} is whole, {before} was, of {last}"

    def _unfinished(self) -> set[tuple[Path, int]]:
        newest = newest_whole(self._run)
        paths = [path for path in iterations(self._run) if number_of(path) > newest]
        return {(path, path.stat().st_mtime_ns) for path in paths}

    def _where(self, unfinished: set[tuple[Path, int]]) -> str:
        if self._unfinished() - unfinished:
            return "inside"
        newest, pointer = newest_whole(self._run), self._run / POINTER
        behind = newest and not (pointer.exists() and pointer.read_text() == str(newest))
        return "pointer" if behind else "outside"

    def _in_a_save(self, known: set[Path], future: Future[list[int]]) -> None:
        """Some moment after the first, second or third directory of an iteration has appeared."""
        awaited = self._random.randint(1, 3)
        while not future.done():
            known_now = set(iterations(self._run))
            awaited -= len(known_now - known)
            known |= known_now
            if awaited <= 0:
                break
            time.sleep(0.001)
        time.sleep(self._random.uniform(0, IN_A_SAVE))

    def _anywhere(self, known: set[Path], future: Future[list[int]]) -> None:
        deadline = time.monotonic() + self._random.uniform(0, ANYWHERE)
        while not future.done() and time.monotonic() < deadline:
            time.sleep(0.01)

    @contextlib.contextmanager
    def _start(self, run: Path, steps: Path) -> Iterator[tuple[list[int], Future[list[int]]]]:
        """Ranks that train, each the first of a group of processes."""
        flags = training_flags(
            self.folder / "data",
            *("--save", str(run), "--load", str(run), "--save-interval", "1"),
            *("--optimizer", "adam", "--train-iters", str(STEPS), "--global-batch-size", "4"),
            *("--keep-last-checkpoints", "2"),
            *self.flags,
        )
        pool = RankPool(self.world_size)
        try:
            with ThreadPoolExecutor(1) as executor:
                future = executor.submit(pool.run, run_recorded, (flags, steps), TIMEOUT)
                yield [pid for pid in pool.pids if pid is not None], future
        finally:
            pool.close()


def kill_saves(folder: Path, kills: int, seed: int, say: Callable[[str], None]) -> Killed:
    """Kill so many runs, of every mode in turn; returns where the kills fell.

    Raises:
        AssertionError: a run did not go on as it should have; says which.
    """
    say(f"seed {seed}")
    folder.mkdir(exist_ok=True)
    write_dataset(folder / "data")
    total: Killed = Counter()
    for mode, (world_size, flags) in enumerate(MODES):
        share = len(range(mode, kills, len(MODES)))
        name = " ".join([f"{world_size} ranks", *flags])
        began = time.monotonic()
        campaign = Campaign(folder, world_size, flags, seed)
        campaign.kill(share)
        campaign.finish()
        say(f"{name}: {dict(campaign.killed)} in {time.monotonic() - began:.0f} s")
        total += campaign.killed
    return total


def main() -> None:
    options = options_parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        total = kill_saves(Path(folder), options.kills, options.seed, print)
    print(f"{options.kills} kills: {dict(total)}; every run went on from a whole checkpoint")


if __name__ == "__main__":
    main()
