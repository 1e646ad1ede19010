"""Runs of a few steps whose checkpoints a test breaks, and what becomes of them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from megatron_trinity.arguments.written import NAME as ARGUMENTS
from megatron_trinity.errors import TrinityError
from megatron_trinity.reporting.schema import NAME as EVENTS
from tests.distributed.pool import RankPools
from tests.steps import recording
from tests.trainer import run_trainer, training_flags, write_dataset

STEPS = 4
POINTER = "latest_checkpointed_iteration.txt"
NEWEST = "iter_0000003"

Outcome = tuple[int, str, str]
"""Exit code, the line of an error, and what was printed."""


def train(rank: int, world_size: int, flags: Sequence[str], steps: Path | None = None) -> Outcome:
    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        if steps is not None:
            stack.enter_context(recording(steps))
        stack.enter_context(contextlib.redirect_stdout(printed))
        try:
            return run_trainer(rank, world_size, flags), "", printed.getvalue()
        except TrinityError as error:
            return error.exit_code, str(error), printed.getvalue()


def flags_of(folder: Path, run: Path, *flags: str) -> list[str]:
    return training_flags(
        folder / "data",
        *("--save", str(run), "--load", str(run), "--save-interval", "1", "--optimizer", "adam"),
        *("--lr-decay-iters", "9", "--train-iters", str(STEPS)),
        *flags,
    )


def train_whole_and_stopped(ranks: RankPools, folder: Path, *flags: str) -> None:
    """Data; a run of all steps, `whole`, with its `steps`; and one `stopped` at 3, with `flags`."""
    write_dataset(folder / "data")
    whole = flags_of(folder, folder / "whole")
    assert ranks.run(train, whole, folder / "steps", world_size=1)[0][:2] == (0, "")
    stopped = flags_of(folder, folder / "stopped", *flags, "--exit-interval", "3")
    assert ranks.run(train, stopped, world_size=1)[0][:2] == (0, "")


def warnings_of(outcome: Outcome) -> list[str]:
    return [line for line in outcome[2].splitlines() if line.startswith("WARNING: skipped")]


RECORD = {EVENTS, ARGUMENTS}
"""Files of a run that go on with every start, whatever becomes of it."""


def names(run: Path) -> set[str]:
    """What is in a run's directory beside its record."""
    return {path.name for path in run.iterdir()} - RECORD


def listing(directory: Path) -> dict[str, tuple[int, str]]:
    """Each file with its time and its content, but those of the run's record."""
    return {
        str(path.relative_to(directory)): (
            path.lstat().st_mtime_ns,
            os.readlink(path)
            if path.is_symlink()
            else hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(directory.rglob("*"))
        if (path.is_symlink() or path.is_file()) and path.name not in RECORD
    }


@contextlib.contextmanager
def small_disk(path: Path, iteration: Path) -> Iterator[Path]:
    """A file system that is full in the third save of what `iteration` holds."""
    size = sum(file.stat().st_size for file in iteration.rglob("*") if file.is_file()) * 5 // 2
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)
