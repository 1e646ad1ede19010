"""Two runs in one `--save`: the second says who has it, and ends, waits or takes over."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_trinity.checkpoint.whole.hold import holding
from megatron_trinity.checkpoint.whole.manifest import MANIFEST
from megatron_trinity.training.held_save import LAST_WORDS, by_store
from tests.broken_runs import POINTER, STEPS, Outcome, flags_of, listing, names, train
from tests.distributed.pool import RankPools
from tests.distributed.test_launcher import LIMIT, launch
from tests.trainer import steps_of, training_flags, write_dataset


def _another_takes_over(run: Path) -> None:
    """What the directory looks like when another host has taken over from this process."""
    [file] = run.glob(".held_*")
    content = {**json.loads(file.read_text()), "machine": "moon", "host": "moon", "id": "other"}
    number = int(file.name.rpartition("_")[2]) + 1
    file.with_name(f".held_{number}").write_text(json.dumps(content))


def train_and_lose(
    rank: int, world_size: int, flags: Sequence[str], run: Path, hook: str
) -> Outcome:
    """Train, and lose the directory before the hook of the second save, or in the second step."""
    from megatron_trinity.training.checkpoints import WholeCheckpoints
    from megatron_trinity.training.observer import StepObserver

    hooked: Any = StepObserver if hook == "step_ended" else WholeCheckpoints
    real, calls = getattr(hooked, hook), itertools.count(1)

    def lose_and_call(self: Any, *args: Any, **kwargs: Any) -> None:
        if next(calls) == 2:
            _another_takes_over(run)
            if hook == "step_ended":
                self._held._sign()  # which is due every ten seconds
        real(self, *args, **kwargs)

    setattr(hooked, hook, lose_and_call)
    try:
        return train(rank, world_size, flags)
    finally:
        setattr(hooked, hook, real)


def train_and_look(rank: int, world_size: int, flags: Sequence[str], looked: Path) -> Outcome:
    """Train, with a sign for each look at who holds `--save`."""
    from megatron_trinity.checkpoint.whole import hold

    real = hold._newest

    def newest(directory: Path) -> tuple[int, bytes]:
        found = real(directory)
        looked.touch()
        return found

    hold._newest = newest
    try:
        return train(rank, world_size, flags)
    finally:
        hold._newest = real


def test_all_ranks_hear_that_it_is_in_use(ranks: RankPools, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    run = tmp_path / "run"
    flags = flags_of(tmp_path, run)
    with holding(run, beat=LIMIT):
        before = listing(run)
        outcomes = ranks.run(train, flags, world_size=2)
        assert listing(run) == before
    [line] = {error for _, error, _ in outcomes}
    assert line.startswith(f"{run} is in use: it is held by process {os.getpid()} on ")
    assert [code for code, _, _ in outcomes] == [1, 1]
    assert not run.exists()


def test_a_run_that_waits_and_one_that_needs_nothing(ranks: RankPools, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    run = tmp_path / "run"
    flags = flags_of(tmp_path, run, "--save-in-use", "wait")
    looked = tmp_path / "looked"
    with ThreadPoolExecutor(1) as executor:
        with holding(run):
            future = executor.submit(ranks.run, train_and_look, flags, looked, world_size=1)
            began = time.monotonic()
            while not looked.exists():
                assert not future.done()
                assert time.monotonic() - began < LIMIT
                time.sleep(0.05)
            assert names(run) == {".held_1"}
        [(code, error, printed)] = future.result()
    assert (code, error) == (0, "")
    [line] = [line for line in printed.splitlines() if "waiting" in line]
    assert line.startswith(f"WARNING: --save {run} is held by process {os.getpid()} on ")
    assert (run / POINTER).read_text() == str(STEPS)

    with holding(run):  # nothing is saved there
        more = flags_of(tmp_path, tmp_path / "other", "--load", str(run), "--finetune")
        assert ranks.run(train, more, world_size=1)[0][:2] == (0, "")
        skipping = flags_of(tmp_path, run, "--skip-train")
        assert ranks.run(train, skipping, world_size=1)[0][:2] == (0, "")
    assert not list(tmp_path.glob("*/.held_*"))


TAKEN = "is not held by this run any more: taken over by process "


@pytest.mark.parametrize(
    ("hook", "background"),
    [
        ("before_save", []),
        ("before_save", ["--async-save"]),
        ("before_pointer", []),
        ("before_pointer", ["--async-save"]),
        ("step_ended", []),
    ],
)
def test_a_run_that_was_taken_over_writes_nothing_more(
    ranks: RankPools, tmp_path: Path, hook: str, background: list[str]
) -> None:
    write_dataset(tmp_path / "data")
    run = tmp_path / "run"
    flags = flags_of(tmp_path, run, *background)
    [(code, error, _)] = ranks.run(train_and_lose, flags, run, hook, world_size=1)
    assert code == 1
    assert f"{run} {TAKEN}" in error
    assert re.search(r" on moon since .*; this one writes nothing more", error)
    assert (run / POINTER).read_text() == "1"
    assert [path.parent.name for path in run.glob(f"*/{MANIFEST}")] == ["iter_0000001"]
    saved = ["iter_0000001", "iter_0000002"] if hook == "before_pointer" else ["iter_0000001"]
    assert sorted(path.name for path in run.glob("iter_*")) == saved
    assert (run / ".held_2").exists()  # it is the other's


@pytest.mark.parametrize("fault", ["", "it is in use"])
def test_ranks_hear_by_the_store_of_their_launch(fault: str) -> None:
    with ThreadPoolExecutor(4) as executor:
        for _ in range(2):
            store = dist.HashStore()
            others = [executor.submit(by_store, store, rank, 4, "") for rank in (1, 2, 3)]
            time.sleep(0.2)
            assert not any(future.done() for future in others)
            began = time.monotonic()
            assert by_store(store, 0, 4, fault) == fault
            assert time.monotonic() - began < LAST_WORDS
            assert [future.result() for future in others] == [fault] * 3


def _wait_for(holds: Callable[[], object], launcher: subprocess.Popen[bytes], output: Path) -> None:
    began = time.monotonic()
    while not holds():
        assert launcher.poll() is None, output.read_text()
        assert time.monotonic() - began < LIMIT, output.read_text()
        time.sleep(0.1)


@pytest.mark.slow
def test_launches_of_torchrun(tmp_path: Path) -> None:
    """A second one ends with one line; the first restarts a rank that dies, and goes on at once."""
    write_dataset(tmp_path / "data")
    run = tmp_path / "run"
    flags = training_flags(
        tmp_path / "data",
        *("--optimizer", "adam", "--train-iters", "100000", "--save", str(run)),
        *("--load", str(run), "--save-interval", "2", "--keep-last-checkpoints", "1"),
    )
    output, other = tmp_path / "output", tmp_path / "other"
    launcher = launch(["--max-restarts", "1", "pretrain_trinity.py", *flags], output)
    try:
        _wait_for(lambda: (run / POINTER).exists(), launcher, output)
        [file] = run.glob(".held_*")
        pid = int(json.loads(file.read_text())["pid"])
        second = launch(["pretrain_trinity.py", *flags], other)
        assert second.wait(LIMIT) == 1
        lines = [line for line in other.read_text().splitlines() if "is in use" in line]
        assert f"error: {run} is in use: it is held by process {pid} on " in lines[0]
        assert f"  traceback : {lines[0]}" in lines[1:]  # torchrun's report of it

        os.kill(pid, signal.SIGKILL)
        _wait_for(lambda: "has ended: it is taken over" in output.read_text(), launcher, output)
        before = len(steps_of(run))
        _wait_for(lambda: len(steps_of(run)) > before + 1, launcher, output)
        assert steps_of(run)[-1] > steps_of(run)[0]
    finally:
        if launcher.poll() is None:
            launcher.terminate()
            launcher.wait(LIMIT)
