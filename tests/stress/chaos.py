"""Break training in every way at random moments, and start it again.

    python -m tests.stress.chaos --faults 100 [--hours 1] [--seed 1] [--json FILE]

Runs of 2 to 4 ranks under torchrun, which is started again by this script, by itself
(`--max-restarts`) or by `scripts/launch.sh`. Each start has to go on from the newest whole
checkpoint, each step has to have the losses and the gradient norm of a run that was left alone, bit
by bit, and the steps that count in the end are each number once. A table says how long a fault has
kept the run from its next step, start-up apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from megatron_trinity.checkpoint.iterations import iterations
from tests.steps import recorded
from tests.stress import warm
from tests.stress.chaos_faults import FAULTS, Fault
from tests.stress.kill_saves import newest_whole
from tests.stress.launches import IN_JOB, SCRIPT, TORCHRUN, Launch, launched, lives
from tests.trainer import training_flags, write_dataset

STEPS, INTERVAL = 24, 4
"""Of a run, and of its saves."""

HANG_MINUTES = 0.1
DISK = 256  # MiB
ANYWHERE, IN_START, IN_A_SAVE = 2.5, 2.0, 0.05
"""Seconds in which a fault comes: after the first step, after the start, after a save has begun."""

SHARDED = ("--use-distributed-optimizer", "--optimizer", "muon")
MODES: list[tuple[int, tuple[str, ...]]] = [
    (2, ()),
    (2, ("--async-save", *SHARDED)),
    (4, ("--expert-model-parallel-size", "2", *SHARDED)),
    (3, ("--async-save", "--micro-batch-size", "4")),
    (2, ("--pipeline-model-parallel-size", "2")),
]
"""Ranks of a run, and flags that make it another one."""

STARTED_BY = {TORCHRUN: 0.74, IN_JOB: 0.2, SCRIPT: 0.06}
"""How often, of starts by this script."""


@dataclass
class Row:
    """What a fault has cost.

    Attributes:
        name: of the fault.
        down: seconds from the fault to the next step, but for those of `start`.
        start: seconds of the start that came then, up to its first step.
        again: steps that were done again.
    """

    name: str
    down: float
    start: float
    again: int


@dataclass
class Campaign:
    """Faults put to runs, one after the other, until enough have been.

    Attributes:
        folder: of data, notes and logs.
        disk: of the runs' checkpoints, of a size of its own; None where nothing can be mounted.
        wanted: faults.
        until: when to end before that, by the monotonic clock.
        rows: of the faults so far.
    """

    folder: Path
    disk: Path | None
    wanted: int
    until: float
    seed: int
    say: Callable[[str], None]
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._faults = [fault for fault in FAULTS if self.disk or fault.name != "a full disk"]
        self._due: list[Fault] = []
        write_dataset(self.folder / "data")

    def is_over(self) -> bool:
        return len(self.rows) >= self.wanted or time.monotonic() > self.until

    def run(self) -> None:
        """Break runs until it is over.

        Raises:
            AssertionError: one did not go on as it should have; says which.
        """
        references: dict[int, dict[int, str]] = {}
        number = 0
        while not self.is_over():
            mode = number % len(MODES)
            if mode not in references:
                references[mode] = self._reference(mode)
            Life(self, number, mode, references[mode]).live()
            number += 1

    def flags(self, mode: int, run: Path) -> list[str]:
        return training_flags(
            self.folder / "data",
            *("--save", str(run), "--load", str(run), "--save-interval", str(INTERVAL)),
            *("--optimizer", "adam", "--train-iters", str(STEPS), "--global-batch-size", "12"),
            *("--keep-last-checkpoints", "3", "--micro-batch-size", "3"),
            *("--hang-minutes", str(HANG_MINUTES), "--exit-within", "60"),
            *MODES[mode][1],
        )

    def next_fault(self, how: str) -> Fault:
        """Each in turn, in an order of chance, as far as the launcher goes on from it."""
        for place, fault in enumerate(self._due):
            if how in fault.under:
                return self._due.pop(place)
        self._due += self._chance.sample(self._faults, len(self._faults))
        return self.next_fault(how)

    def put_back(self, fault: Fault) -> None:
        """One that has not come is the next."""
        self._due.insert(0, fault)

    def close(self, row: Row) -> None:
        self.rows.append(row)
        self.say(
            f"{len(self.rows)}: {row.name}, {row.down:.1f} s and a start of {row.start:.1f} s; "
            f"{row.again} steps again"
        )

    def _reference(self, mode: int) -> dict[int, str]:
        folder, run = self.folder / f"reference-{mode}", self.folder / f"whole-{mode}"
        with launched(folder, TORCHRUN, MODES[mode][0], self.flags(mode, run)) as launch:
            launch.wait_for(lambda: False, "the end")
            steps = recorded(folder / "steps")
            assert [number for number, _ in steps] == list(range(1, STEPS + 1)), launch.output()
        shutil.rmtree(run)
        return dict(steps)


class Life:
    """One run, from its first step to its last."""

    def __init__(
        self, campaign: Campaign, number: int, mode: int, reference: dict[int, str]
    ) -> None:
        self._of, self._number, self._mode = campaign, number, mode
        self._reference = reference
        self._chance = campaign._chance
        self._folder = campaign.folder / f"run-{number}"
        self._run = (campaign.disk or campaign.folder) / f"checkpoints-{number}"
        self._seen = 0  # steps that are checked
        self._history: list[int] = []  # iterations that count
        self._open: list[Row] = []  # faults whose next step has not come

    def live(self) -> None:
        while newest_whole(self._run) < STEPS:
            how = self._chance.choices(list(STARTED_BY), list(STARTED_BY.values()))[0]
            if self._of.is_over():
                how = TORCHRUN
            flags = self._of.flags(self._mode, self._run)
            with launched(self._folder, how, MODES[self._mode][0], flags) as launch:
                self._break(launch)
        self._check_steps(newest_whole(self._run))
        assert self._history == list(range(1, STEPS + 1))
        shutil.rmtree(self._run)
        self._of.say(f"run {self._number} has come to its end, with the losses of one left alone")

    def _break(self, launch: Launch) -> None:
        """Until the launch has ended, one way or the other."""
        while True:
            fault = None if self._of.is_over() else self._of.next_fault(launch.how)
            before = newest_whole(self._run)
            if fault is None or not self._comes(launch, fault):
                launch.wait_for(lambda: False, "the end")
                self._note_start(launch)
                self._check_steps(before)
                if fault is not None:
                    self._of.put_back(fault)
                assert newest_whole(self._run) == STEPS, launch.output()
                return
            pids, mark, struck = list(launch.pids().values()), launch.mark(), time.time()
            fault.happen(launch, self._run, self._chance)
            ends = launch.how == TORCHRUN or fault.ends_launcher
            launch.wait_for_end(pids, ends)
            self._note_start(launch)  # a first step may have come since
            launch.renew(pids)
            codes = launch.codes(pids, mark)
            assert codes <= fault.codes | {0}, f"{fault.name}: {codes}\n{launch.output()}"
            done = self._check_steps(before)
            if fault.then is not None:
                fault.then(self._run, self._chance)
            self._check_saved(fault, before, done, launch)
            newest = newest_whole(self._run)
            again = 0 if done is None else max(done - newest, 0)
            self._open.append(Row(fault.name, launch.began - struck, 0.0, again))
            if ends:
                return

    def _comes(self, launch: Launch, fault: Fault) -> bool:
        """Wait for the moment of the fault; False if the run has ended before."""
        chance, ranks = self._chance.random(), MODES[self._mode][0]
        launch.wait_for(lambda: len(launch.of("rank")) == ranks, "a rank")
        if fault.early and chance < 0.2:
            self._sleep(launch, self._chance.uniform(0, IN_START))
        else:
            launch.wait_for(lambda: launch.of("step"), "a step")
            if fault.early and chance < 0.5:
                known = set(iterations(self._run))
                launch.wait_for(lambda: set(iterations(self._run)) - known, "a save")
                self._sleep(launch, self._chance.uniform(0, IN_A_SAVE))
            else:
                self._sleep(launch, self._chance.uniform(0, ANYWHERE))
        # One that damages needs another checkpoint to go on from.
        if fault.name == "a damaged checkpoint":
            launch.wait_for(lambda: newest_whole(self._run) >= 2 * INTERVAL, "a second checkpoint")
        self._note_start(launch)
        return launch.is_running() and all(map(lives, launch.pids().values()))

    def _sleep(self, launch: Launch, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while launch.is_running() and time.monotonic() < deadline:
            time.sleep(0.005)

    def _note_start(self, launch: Launch) -> None:
        """Close the rows of faults, if the step that they wait for has come."""
        steps, begins = launch.of("step"), launch.of("begins")
        if not steps:
            return
        first = min(event["at"] for event in begins)
        for row in self._open:
            row.start = first - launch.began
            row.down += steps[0]["at"] - first
            self._of.close(row)
        self._open.clear()

    def _check_steps(self, before: int) -> int | None:
        """Compare the new steps with the reference; returns the last one."""
        steps = recorded(self._folder / "steps")[self._seen :]
        self._seen += len(steps)
        for number, values in steps:
            assert values == self._reference[number], f"step {number} has other values"
        numbers = [number for number, _ in steps]
        if not numbers:
            return None
        assert numbers == list(range(before + 1, before + 1 + len(numbers))), (
            f"steps {numbers} behind iteration {before}"
        )
        assert len(self._history) >= before, f"steps behind {len(self._history)} are lost"
        self._history = [*self._history[:before], *numbers]
        return numbers[-1]

    def _check_saved(self, fault: Fault, before: int, done: int | None, launch: Launch) -> None:
        newest = newest_whole(self._run)
        if fault.name == "a damaged checkpoint":
            assert newest < (done or before), "the damage is not seen"
            return
        least = before if done is None else done
        if done is not None and not fault.saved:
            late = 2 if "--async-save" in MODES[self._mode][1] or fault.then else 1
            least = max(before, ((done - 1) // INTERVAL - late + 1) * INTERVAL)
        assert newest >= least, (
            f"{fault.name}: {newest} is whole, {before} was, of {done}\n{launch.output()}"
        )


def table(rows: list[Row]) -> list[dict[str, Any]]:
    """By kind of fault: number, seconds to the next step, of start-up, and steps done again."""
    lines = []
    for name in dict.fromkeys(fault.name for fault in FAULTS):
        of_name = [row for row in rows if row.name == name]
        if of_name:
            down = [row.down for row in of_name]
            lines.append(
                {
                    "fault": name,
                    "number": len(of_name),
                    "min": round(min(down), 2),
                    "median": round(median(down), 2),
                    "max": round(max(down), 2),
                    "start": round(median(row.start for row in of_name), 2),
                    "again": sum(row.again for row in of_name),
                }
            )
    return lines


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of its own; None where nothing can be mounted."""
    path = folder / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        yield None
        return
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def chaos(
    folder: Path, faults: int, hours: float, seed: int, say: Callable[[str], None]
) -> list[Row]:
    """Put so many faults to runs, or as many as come in so many hours.

    Raises:
        AssertionError: a run did not go on as it should have; says which.
    """
    say(f"seed {seed}")
    os.environ.update(warm.ENVIRONMENT)
    with small_disk(folder) as disk:
        if disk is None:
            say("nothing can be mounted here: no full disk")
        campaign = Campaign(folder, disk, faults, time.monotonic() + 3600 * hours, seed, say)
        try:
            campaign.run()
        finally:
            for line in table(campaign.rows):
                say(json.dumps(line))
    return campaign.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is mounted and started goes too
    with tempfile.TemporaryDirectory() as folder:
        rows = chaos(Path(folder), options.faults, options.hours, options.seed, print)
    if options.json is not None:
        options.json.write_text(json.dumps(table(rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
