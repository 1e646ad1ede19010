"""Work in units: resumed, stopped, spread over processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_trinity.checkpoint.conversion.staging import resumable_staging
from megatron_trinity.checkpoint.conversion.tasks import Report, Task, run_tasks
from megatron_trinity.errors import TrinityError
from megatron_trinity.progress import SilentProgress

PLAN = ["a plan"]


class Seen(SilentProgress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[int] = []

    def update(self, done_bytes: int, note: str = "") -> None:
        self.done.append(done_bytes)


def work(job: tuple[Path, int], report: Report) -> tuple[int, int]:
    """Leaves a mark for each time that it is done; a negative number fails."""
    folder, number = job
    with open(folder / "log", "a") as log:
        log.write(f"{number}\n")
    if number < 0:
        raise TrinityError("a bad unit")
    report(10)
    return number**2, os.getpid()


def units(folder: Path, *numbers: int) -> list[Task]:
    return [Task(f"unit-{n}", 10, (folder, number)) for n, number in enumerate(numbers)]


def do_and_fail(target: Path, units: list[Task], error: BaseException, workers: int = 1) -> None:
    """Do units, and end as if `error` had come next."""
    with resumable_staging(target, PLAN, 0) as staging:
        run_tasks(work, units, staging, workers, Seen())
        raise error


def log(folder: Path) -> list[int]:
    return sorted(int(line) for line in (folder / "log").read_text().splitlines())


def squares(results: list[Any]) -> list[int]:
    return [square for square, _ in results]


@pytest.mark.parametrize("workers", [1, 3])
def test_every_unit_is_done_once_and_in_order(tmp_path: Path, workers: int) -> None:
    shown = Seen()
    with resumable_staging(tmp_path / "out", PLAN, 0) as staging:
        results = run_tasks(work, units(tmp_path, 3, 1, 2), staging, workers, shown)
    assert squares(results) == [9, 1, 4]
    assert log(tmp_path) == [1, 2, 3]
    assert shown.done[-1] == 30
    assert shown.done == sorted(shown.done)
    assert (os.getpid() in {process for _, process in results}) == (workers == 1)
    assert not (tmp_path / ".out.part").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_finished_units_are_not_done_again(tmp_path: Path, workers: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        do_and_fail(tmp_path / "out", units(tmp_path, 3, 1), KeyboardInterrupt(), workers)
    shown = Seen()
    with resumable_staging(tmp_path / "out", PLAN, 0) as staging:
        results = run_tasks(work, units(tmp_path, 3, 1, 2), staging, workers, shown)
    assert squares(results) == [9, 1, 4]
    assert log(tmp_path) == [1, 2, 3]
    assert shown.done == [30]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_does_not_settle_is_done_again(tmp_path: Path, workers: int) -> None:
    def settle(result: tuple[int, int]) -> None:
        if result[0] == 1:
            raise OSError("the disk does not have it")

    jobs = units(tmp_path, 3, 1)
    with (
        pytest.raises(TrinityError, match="the disk does not have it; what is finished is kept"),
        resumable_staging(tmp_path / "out", PLAN, 0) as staging,
    ):
        run_tasks(work, jobs, staging, workers, Seen(), settle)
    with resumable_staging(tmp_path / "out", PLAN, 0) as staging:
        run_tasks(work, jobs, staging, workers, Seen())
    assert log(tmp_path).count(1) == 2


def test_another_plan_starts_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        do_and_fail(tmp_path / "out", units(tmp_path, 3), KeyboardInterrupt())
    (tmp_path / ".out.part/whole").mkdir()
    with resumable_staging(tmp_path / "out", ["another"], 0) as staging:
        assert sorted(path.name for path in staging.iterdir()) == ["lock", "plan.json"]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_unit_is_raised_and_nothing_is_left(tmp_path: Path, workers: int) -> None:
    target = tmp_path / "new/out"
    with (
        pytest.raises(TrinityError, match=r"^a bad unit$"),
        resumable_staging(target, PLAN, 0) as staging,
    ):
        run_tasks(work, units(tmp_path, 1, -1, 2), staging, workers, Seen())
    assert not target.parent.exists()


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path) -> None:
    target = tmp_path / "out"
    staging = tmp_path / ".out.part"
    with pytest.raises(TrinityError) as told:
        do_and_fail(target, units(tmp_path, 3), OSError(28, "No space left on device"))
    assert str(told.value) == (
        f"cannot write {target}: No space left on device; what is finished is kept in {staging}, "
        "run the same again to go on"
    )
    assert (staging / "unit-0.done").is_file()


def test_a_disk_that_is_too_small_is_told_at_the_start(tmp_path: Path) -> None:
    with (
        pytest.raises(TrinityError, match=r"^1,000,000.0 GB are to be written and .* GB free$"),
        resumable_staging(tmp_path / "out", PLAN, 10**15),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with resumable_staging(target, PLAN, 0) as staging:
        with (
            pytest.raises(TrinityError, match=f"^another process is writing {target}$"),
            resumable_staging(target, PLAN, 0),
        ):
            pass
        assert staging.is_dir()
