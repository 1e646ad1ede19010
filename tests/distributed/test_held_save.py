"""Two runs in one `--save`: the second says who has it, and ends, waits or takes over."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_trinity.checkpoint.whole.hold import holding
from tests.broken_runs import POINTER, STEPS, Outcome, flags_of, listing, train
from tests.distributed.pool import RankPools
from tests.distributed.test_launcher import LIMIT, launch
from tests.trainer import training_flags, write_dataset

Lost = Callable[[Path], object]


def _another_takes_over(run: Path) -> None:
    """What the directory looks like when another host has taken over from this process."""
    [file] = run.glob(".held_*")
    content = {**json.loads(file.read_text()), "machine": "moon", "host": "moon", "id": "other"}
    number = int(file.name.rpartition("_")[2]) + 1
    file.with_name(f".held_{number}").write_text(json.dumps(content))


def train_and_lose(rank: int, world_size: int, flags: Sequence[str], run: Path) -> Outcome:
    """Train, and lose the directory before the second save."""
    from megatron_trinity.training.checkpoints import WholeCheckpoints

    real = WholeCheckpoints.before_save

    def before_save(self: WholeCheckpoints, directory: Path) -> None:
        if directory.name == "iter_0000002":
            _another_takes_over(run)
        real(self, directory)

    WholeCheckpoints.before_save = before_save  # type: ignore[method-assign]
    try:
        return train(rank, world_size, flags)
    finally:
        WholeCheckpoints.before_save = real  # type: ignore[method-assign]


def test_all_ranks_hear_that_it_is_in_use(ranks: RankPools, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    run = tmp_path / "run"
    flags = flags_of(tmp_path, run)
    with holding(run):
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
    ranks.pool(1)  # so that what follows is the wait alone
    with ThreadPoolExecutor(1) as executor:
        with holding(run):
            future = executor.submit(ranks.run, train, flags, world_size=1)
            time.sleep(3)
            assert not future.done()
            assert [path.name for path in run.iterdir()] == [".held_1"]
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


@pytest.mark.parametrize("background", [[], ["--async-save"]])
def test_a_run_that_was_taken_over_writes_nothing_more(
    ranks: RankPools, tmp_path: Path, background: list[str]
) -> None:
    write_dataset(tmp_path / "data")
    run = tmp_path / "run"
    flags = flags_of(tmp_path, run, *background)
    [(code, error, _)] = ranks.run(train_and_lose, flags, run, world_size=1)
    assert code == 1
    assert error.startswith(f"{run} is not held by this run any more: taken over by process ")
    assert " on moon since " in error
    assert (run / POINTER).read_text() == "1"
    names = {path.name for path in run.iterdir() if not path.name.startswith(".held_")}
    assert names == {"iter_0000001", POINTER}
    assert (run / ".held_2").exists()  # it is the other's


def _steps(output: Path) -> list[int]:
    return [int(number) for number in re.findall(r"iteration +(\d+)/", output.read_text())]


def _wait_for(holds: Callable[[], object], launcher: subprocess.Popen[bytes], output: Path) -> None:
    began = time.monotonic()
    while not holds():
        assert launcher.poll() is None, output.read_text()
        assert time.monotonic() - began < LIMIT, output.read_text()
        time.sleep(0.1)


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
        assert lines[1:] == [f"  traceback : {lines[0]}"]  # torchrun's report of it

        os.kill(pid, signal.SIGKILL)
        _wait_for(lambda: "has ended: it is taken over" in output.read_text(), launcher, output)
        before = len(_steps(output))
        _wait_for(lambda: len(_steps(output)) > before + 1, launcher, output)
        assert _steps(output)[-1] > _steps(output)[0]
    finally:
        if launcher.poll() is None:
            launcher.terminate()
            launcher.wait(LIMIT)
