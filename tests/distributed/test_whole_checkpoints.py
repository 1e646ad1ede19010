"""A checkpoint is whole or nothing: what is broken is skipped or refused in one line, untouched."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_trinity.checkpoint.whole.manifest import MANIFEST
from tests.broken_runs import (
    NEWEST,
    POINTER,
    STEPS,
    Outcome,
    flags_of,
    listing,
    names,
    small_disk,
    train,
    train_whole_and_stopped,
    warnings_of,
)
from tests.checkpoints import Payload, check_whole, flip_bit
from tests.crosses import first, slow
from tests.distributed.pool import RankPools
from tests.steps import recorded
from tests.trainer import run_trainer

DATA = "__0_0.distcp"


def train_full_disk(rank: int, world_size: int, flags: Sequence[str], full: str) -> Outcome:
    """Train where the file that ends with `full` meets the end of the disk."""
    real = os.fsync

    def fsync(fd: Any) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    os.fsync = fsync
    try:
        return train(rank, world_size, flags)
    finally:
        os.fsync = real


@pytest.fixture(scope="module")
def folder(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a run of all steps without an interruption, and one that has been stopped at 3."""
    folder = tmp_path_factory.mktemp("whole")
    train_whole_and_stopped(ranks, folder)
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run that a test may break."""
    shutil.copytree(folder / "stopped", tmp_path / "run")
    return tmp_path / "run"


def _flip(iteration: Path) -> None:
    flip_bit(iteration / DATA)


def _truncate(iteration: Path) -> None:
    os.truncate(iteration / DATA, 1000)


def _unreadable(iteration: Path) -> None:
    (iteration / DATA).unlink()
    (iteration / DATA).symlink_to(DATA)  # to itself: root cannot read it either


def _metadata_payload(iteration: Path) -> None:
    size = (iteration / ".metadata").stat().st_size
    payload = pickle.dumps(Payload(iteration.parent / "mark"))
    (iteration / ".metadata").write_bytes(payload + bytes(size - len(payload)))


def _common_payload(iteration: Path) -> None:
    (iteration / "common.pt").write_bytes(pickle.dumps(Payload(iteration.parent / "mark")))


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped bit": (_flip, f"{DATA} has another content than was saved"),
    "truncated file": (_truncate, f"{DATA} has 1000 bytes in place of"),
    "missing file": (lambda path: (path / DATA).unlink(), f"{DATA} is missing"),
    "missing metadata": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "missing manifest": (lambda path: (path / MANIFEST).unlink(), "it was not saved to the end"),
    "broken manifest": (lambda path: (path / MANIFEST).write_text("{"), "cannot be read"),
    "unreadable file": (_unreadable, f"{DATA} cannot be read"),
    "payload for metadata": (_metadata_payload, ".metadata has another content than was saved"),
    "payload beside it": (_common_payload, "common.pt was not saved with it"),
}


@pytest.mark.parametrize("fault", first(5, FAULTS))
def test_a_fault_is_skipped_or_refused(
    ranks: RankPools, folder: Path, run: Path, tmp_path: Path, fault: str
) -> None:
    break_, words = FAULTS[fault]
    break_(run / NEWEST)
    before = listing(run)
    flags = flags_of(folder, run)

    for path in ("iter_0000001", "iter_0000002"):
        (run / path).rename(tmp_path / path)
    alone = listing(run)
    code, error, _ = ranks.run(train, flags, world_size=1)[0]
    assert code == 1
    assert error.startswith(f"no checkpoint under {run} is whole: {run / NEWEST}: ")
    # Before anything is built `.metadata` is read, and what it may not name is not run.
    assert (words in error) or ("payload" in fault and "nothing was executed" in error)
    assert "\n" not in error
    assert listing(run) == alone
    for path in ("iter_0000001", "iter_0000002"):
        (tmp_path / path).rename(run / path)
    assert listing(run) == before

    outcome = ranks.run(train, flags, tmp_path / "steps", world_size=1)[0]
    assert outcome[:2] == (0, "")
    (warning,) = warnings_of(outcome)
    assert warning.startswith(f"WARNING: skipped {run / NEWEST}: ")
    assert words in warning
    assert recorded(tmp_path / "steps") == recorded(folder / "steps")[2:]
    after = listing(run)
    kept = [name for name in before if name.startswith(("iter_0000001", "iter_0000002"))]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    for number in range(1, STEPS + 1):
        check_whole(run / f"iter_{number:07d}", checksums=True)
    assert (run / POINTER).read_text() == str(STEPS)
    assert not (run / "mark").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    first(
        2,
        [
            ("1", None),
            ("7", "it names iter_0000007, which is not there"),
            ("garbage", "it names no iteration"),
            ("", "it names no iteration"),
            (None, None),
        ],
    ),
)
def test_the_pointer_is_a_hint(
    ranks: RankPools,
    folder: Path,
    run: Path,
    tmp_path: Path,
    content: str | None,
    words: str | None,
) -> None:
    if content is None:
        (run / POINTER).unlink()
    else:
        (run / POINTER).write_text(content)
    outcome = ranks.run(train, flags_of(folder, run), tmp_path / "steps", world_size=1)[0]
    assert outcome[:2] == (0, "")
    warned = [] if words is None else [f"WARNING: skipped {run / POINTER}: {words}"]
    assert warnings_of(outcome) == warned
    assert recorded(tmp_path / "steps") == recorded(folder / "steps")[3:]
    assert (run / POINTER).read_text() == str(STEPS)


def test_a_pointer_to_nothing_is_no_new_run(ranks: RankPools, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / POINTER).write_text("2")
    code, error, _ = ranks.run(train, flags_of(folder, tmp_path / "run"), world_size=1)[0]
    assert code == 1
    assert "it names iter_0000002, which is not there" in error


def test_all_ranks_agree_on_what_one_of_them_finds(
    ranks: RankPools, folder: Path, run: Path, tmp_path: Path
) -> None:
    """Of three files, the middle one by size is verified by rank 1."""
    flags = flags_of(folder, run, "--exit-interval", "1")
    content = bytearray((run / NEWEST / ".metadata").read_bytes())
    content[-2] ^= 1
    (run / NEWEST / ".metadata").write_bytes(content)
    outcomes = ranks.run(train, flags, world_size=2)
    assert [outcome[:2] for outcome in outcomes] == [(0, "")] * 2
    (warning,) = warnings_of(outcomes[0])
    assert ".metadata has another content than was saved" in warning
    assert warnings_of(outcomes[1]) == []


def test_without_checksums_sizes_are_compared(ranks: RankPools, folder: Path, run: Path) -> None:
    _flip(run / NEWEST)
    flags = flags_of(folder, run, "--no-verify-checkpoint")
    outcome = ranks.run(train, flags, world_size=1)[0]
    assert outcome[0] == 0
    assert warnings_of(outcome) == []
    _truncate(run / "iter_0000004")
    outcome = ranks.run(train, flags, world_size=1)[0]
    assert f"{DATA} has 1000 bytes in place of" in warnings_of(outcome)[0]


def test_an_iteration_that_is_named(
    ranks: RankPools, folder: Path, run: Path, tmp_path: Path
) -> None:
    """It has to be whole; without a manifest, as Megatron writes it, it loads with a warning."""
    other = str(tmp_path / "other")
    flags = [*flags_of(folder, run, "--save", other), "--ckpt-step", "3"]
    _flip(run / NEWEST)
    code, error, _ = ranks.run(train, flags, world_size=1)[0]
    assert code == 1
    assert error.startswith(f"{run / NEWEST}: {DATA} has another content than was saved")
    assert "--ckpt-step" in error

    _flip(run / NEWEST)  # back
    (run / NEWEST / MANIFEST).unlink()
    outcome = ranks.run(train, flags, tmp_path / "steps", world_size=1)[0]
    assert outcome[0] == 0
    assert f"WARNING: nothing says whether {run / NEWEST} is whole" in outcome[2]
    assert recorded(tmp_path / "steps") == recorded(folder / "steps")[3:]

    shutil.rmtree(other)
    _truncate(run / NEWEST)
    code, error, _ = ranks.run(train, flags, world_size=1)[0]
    assert code == 1
    assert f"{DATA} has 1000 bytes, " in error


def test_older_iterations_are_not_written_beside_newer_ones(
    ranks: RankPools, folder: Path, run: Path
) -> None:
    before = listing(run)
    for flags in (["--ckpt-step", "2"], ["--finetune"]):
        code, error, _ = ranks.run(train, [*flags_of(folder, run), *flags], world_size=1)[0]
        assert code == 2
        assert f"has {NEWEST} already" in error
    assert listing(run) == before


def test_a_save_path_that_is_not_writable(
    ranks: RankPools, folder: Path, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    flags = [*flags_of(folder, run), "--save", str(tmp_path / "file" / "run")]
    code, error, _ = ranks.run(train, flags, world_size=1)[0]
    assert code == 1
    assert f"{tmp_path / 'file'} is not a writable directory" in error


def test_pretrained_weights_are_verified_as_well(
    ranks: RankPools, folder: Path, run: Path, tmp_path: Path
) -> None:
    _flip(run / NEWEST)
    words = ("--pretrained-checkpoint", str(run), "--verbose-log")
    other = flags_of(folder, tmp_path / "other", *words)
    outcome = ranks.run(train, other, world_size=1)[0]
    assert outcome[:2] == (0, "")
    (warning,) = warnings_of(outcome)
    assert warning.startswith(f"WARNING: skipped {run / NEWEST}: ")
    assert f"loading distributed checkpoint from {run} at iteration 2" in outcome[2]
    assert (tmp_path / "other" / POINTER).read_text() == str(STEPS)


@pytest.mark.parametrize("background", [[], slow(["--async-save"])])
def test_what_is_kept(ranks: RankPools, folder: Path, run: Path, background: list[str]) -> None:
    """Of 1, 2, 3 (broken) and 4: the newest, and what 2 divides; and no leftovers of others."""
    (run / NEWEST / MANIFEST).unlink()
    (run / f".{NEWEST}.saving").touch()
    (run / ".iter_0000000.discarded").mkdir()
    keep = ["--keep-last-checkpoints", "1", "--keep-every-iterations", "2"]
    before = listing(run)
    flags = [*flags_of(folder, run), *keep, "--save-interval", "2", *background]
    assert ranks.run(train, flags, world_size=1)[0][:2] == (0, "")
    kept = {"iter_0000002", "iter_0000004", POINTER}
    assert names(run) == kept
    after = listing(run)
    assert all(after[name] == before[name] for name in before if name.startswith("iter_0000002"))
    check_whole(run / "iter_0000004", checksums=True)


@pytest.mark.parametrize(
    ("world_size", "full"),
    # The others are of rank 0 alone; the launcher would end the ranks that wait for it.
    first(
        1,
        [
            (2, "__1_0.distcp"),
            (1, f".{POINTER}.new"),
            (1, ".metadata.tmp"),
            (1, f".{MANIFEST}.new"),
        ],
    ),
)
def test_a_disk_that_fills_up(
    ranks: RankPools, folder: Path, tmp_path: Path, world_size: int, full: str
) -> None:
    run = tmp_path / "run"
    once = flags_of(folder, run, "--exit-interval", "1")
    assert ranks.run(run_trainer, once, world_size=world_size) == [0] * world_size
    before = listing(run)
    flags = flags_of(folder, run)
    code, error, _ = ranks.run(train_full_disk, flags, full, world_size=world_size)[0]
    assert code == 1
    assert "iteration 2 could not be saved" in error
    assert "goes on from the checkpoint before it" in error
    after = listing(run)
    assert {name: after[name] for name in before} == before

    # The pointer is the last: a checkpoint that it does not name yet is whole.
    start = 3 if full.endswith(f"{POINTER}.new") else 2
    outcomes = ranks.run(train, flags, tmp_path / "steps", world_size=world_size)
    assert outcomes[-1][:2] == (0, "")
    steps = recorded(tmp_path / "steps")
    assert [number for number, _ in steps] == list(range(start, STEPS + 1))
    if world_size == 1:
        assert steps == recorded(folder / "steps")[start - 1 :]
    assert (run / POINTER).read_text() == str(STEPS)


@pytest.mark.parametrize("background", [[], slow(["--async-save"])])
def test_a_disk_that_is_full(
    ranks: RankPools, folder: Path, tmp_path: Path, background: list[str]
) -> None:
    with small_disk(tmp_path / "disk", folder / "whole" / NEWEST) as disk:
        run = disk / "run"
        flags = [*flags_of(folder, run), *background]
        code, error, _ = ranks.run(train, flags, world_size=1)[0]
        assert code == 1
        assert f"the disk of {run} is full" in error
        for number in (1, 2):
            check_whole(run / f"iter_{number:07d}", checksums=True)
        assert not (run / NEWEST / MANIFEST).exists()

        code, error, _ = ranks.run(train, flags, world_size=1)[0]  # full at its start
        assert code == 1
        assert f"the disk of {run} is full" in error
        subprocess.run(["mount", "-o", "remount,size=99m", str(disk)], check=True)
        outcome = ranks.run(train, flags, tmp_path / "steps", world_size=1)[0]
        assert outcome[:2] == (0, "")
        assert recorded(tmp_path / "steps") == recorded(folder / "steps")[2:]
        assert (run / POINTER).read_text() == str(STEPS)
