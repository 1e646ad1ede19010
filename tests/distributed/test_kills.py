"""Runs that are killed, wherever that falls, go on from a whole checkpoint, bit by bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_trinity.checkpoint.inspect import inspect_checkpoint
from megatron_trinity.checkpoint.iterations import find_iteration
from tests.broken_runs import POINTER, STEPS, flags_of, listing, train
from tests.crosses import slow
from tests.distributed.pool import RankError, RankPools
from tests.stress.kill_saves import MODES, kill_saves
from tests.trainer import run_trainer, write_dataset

SEED = 20


@pytest.mark.distributed
@pytest.mark.parametrize("kills", [slow(len(MODES)), slow(30)])
def test_a_killed_run_goes_on_from_a_whole_checkpoint(tmp_path: Path, kills: int) -> None:
    killed = kill_saves(tmp_path / "kills", kills, SEED, print)
    assert killed.total() == kills
    if kills > len(MODES):  # where a single one falls is chance
        assert killed["inside"] >= kills // 5
        assert killed["outside"] >= 1


def train_to_the_last_pointer(rank: int, world_size: int, flags: Sequence[str]) -> None:
    """Train, and die between the manifest and the pointer of the last save."""
    from megatron_trinity.training import checkpoints

    write_manifest = checkpoints.write_manifest

    def then_die(directory: Path, *known: Any) -> None:
        write_manifest(directory, *known)
        if directory.name == f"iter_{STEPS:07d}":
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(checkpoints, "write_manifest", then_die)
    run_trainer(rank, world_size, flags)


def test_a_kill_between_the_last_manifest_and_its_pointer(ranks: RankPools, tmp_path: Path) -> None:
    """The next start has nothing to train, so it is the start that mends the pointer."""
    write_dataset(tmp_path / "data")
    run = tmp_path / "run"
    flags = flags_of(tmp_path, run)
    with pytest.raises(RankError, match="SIGKILL"):
        ranks.run(train_to_the_last_pointer, flags, world_size=1)
    newest = run / f"iter_{STEPS:07d}"
    assert (run / POINTER).read_text() == str(STEPS - 1)
    assert find_iteration(run) == newest
    assert inspect_checkpoint(run).path == str(newest)
    before = listing(newest)
    code, _, printed = ranks.run(train, flags, world_size=1)[0]
    assert code == 0
    assert f"WARNING: {run / POINTER} lagged behind {newest.name}; it names that now" in printed
    assert (run / POINTER).read_text() == str(STEPS)
    assert listing(newest) == before


def train_to_a_gather(rank: int, world_size: int, flags: Sequence[str]) -> None:
    """Train, and die on rank 1 in the last step, between reduce-scatter and gather."""
    from megatron_trinity.optimizer.shards import Shards

    gather, steps = Shards.gather, 0

    def die_first(self: Shards, now: bool) -> None:
        nonlocal steps
        steps += 1
        if rank == 1 and steps == STEPS:
            os.kill(os.getpid(), signal.SIGKILL)
        gather(self, now)

    setattr(Shards, "gather", die_first)
    run_trainer(rank, world_size, flags)


@pytest.mark.slow
def test_a_kill_between_gradients_and_weights(ranks: RankPools, tmp_path: Path) -> None:
    """The last whole checkpoint is the newest, and the run goes on from it to its end."""
    write_dataset(tmp_path / "data")
    run = tmp_path / "run"
    sharded = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
    rates = ("--optimizer", "muon", "--adamw-lr", "1e-3")
    flags = [*flags_of(tmp_path, run), *rates, *sharded]
    with pytest.raises(RankError):
        ranks.run(train_to_a_gather, flags, world_size=2)
    assert (run / POINTER).read_text() == str(STEPS - 1)
    assert find_iteration(run) == run / f"iter_{STEPS - 1:07d}"
    assert [code for code, *_ in ranks.run(train, flags, world_size=2)] == [0, 0]
    assert find_iteration(run) == run / f"iter_{STEPS:07d}"
