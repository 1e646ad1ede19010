"""The rank that keeps the others waiting is named, whatever it is slow at."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.broken_runs import STEPS, Outcome, flags_of, train
from tests.crosses import first
from tests.distributed.pool import RankPools
from tests.trainer import logged, write_dataset

SLOW = 1.0
"""Seconds by which the slow rank is late in each step: many times what the step takes."""

SAMPLES = 4
"""Of a rank in a step, in one micro-batch."""


def sleeps(seconds: float) -> None:
    time.sleep(seconds)


def computes(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@contextmanager
def slow_rank(where: str, how: Any, rank: int) -> Iterator[None]:
    """Rank `rank` is late in its forward pass, in its optimizer or in reading a sample."""
    import torch.distributed as dist

    from megatron_trinity.data.samples import SampleFormat
    from megatron_trinity.optimizer.optimizer import TrinityOptimizer
    from megatron_trinity.training import pretrain

    owner, name = {
        "forward": (pretrain, "forward_step"),
        "optimizer": (TrinityOptimizer, "_step_adamw"),
        "data": (SampleFormat, "sample"),
    }[where]
    seconds = SLOW / SAMPLES if where == "data" else SLOW
    original = getattr(owner, name)

    def late(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == rank:
            how(seconds)
        return original(*args, **kwargs)

    setattr(owner, name, late)
    try:
        yield
    finally:
        setattr(owner, name, original)


def train_with_slow_rank(
    rank: int, world_size: int, flags: Sequence[str], where: str, how: Any, slow: int
) -> Outcome:
    import torch.distributed as dist

    waits = dist.Work.wait
    with slow_rank(where, how, slow):
        outcome = train(rank, world_size, flags)
    assert dist.Work.wait is waits
    return outcome


LINE = re.compile(
    r" ranks +(\d+) \| slowest: rank (\d+) on (\S+) \| its own time \(ms\): ([\d.]+) \| "
    r"to the median: ([\d.]+) \| forward-backward: ([\d.]+) \| optimizer: ([\d.]+) \| "
    r"data: ([\d.]+) \|"
)


@pytest.mark.parametrize(
    ("where", "how", "flags"),
    first(
        1,
        [
            ("forward", sleeps, ("--expert-model-parallel-size", "2")),
            ("forward", computes, ()),
            ("forward", sleeps, ("--use-distributed-optimizer", "--overlap-grad-reduce")),
            ("optimizer", sleeps, ("--optimizer", "muon")),
            ("data", sleeps, ()),
        ],
    ),
)
def test_the_slow_rank_is_named(
    ranks: RankPools, tmp_path: Path, where: str, how: Any, flags: tuple[str, ...]
) -> None:
    write_dataset(tmp_path / "data")
    board = tmp_path / "board"
    run = flags_of(
        *(tmp_path, tmp_path / "run", "--straggler-interval", str(STEPS)),
        *("--micro-batch-size", str(SAMPLES), "--eval-iters", "0"),
        *("--tensorboard-dir", str(board), "--tensorboard-log-interval", "3", *flags),
    )
    outcomes = ranks.run(train_with_slow_rank, run, where, how, 1, world_size=2)
    assert [outcome[:2] for outcome in outcomes] == [(0, "")] * 2
    [line] = [line for line in outcomes[-1][2].splitlines() if line.startswith(" ranks  ")]
    found = LINE.fullmatch(line)
    assert found is not None, line
    assert found[1] == str(STEPS)
    assert found[2] == "1", line
    own, ratio, forward, optimizer, data = (float(found[n]) for n in range(4, 9))
    assert own >= 1e3 * SLOW
    assert ratio > 1.2
    assert {"forward": forward, "optimizer": optimizer, "data": data}[where] > 1.2
    assert logged(board, "slowest rank") == {STEPS: 1.0}
    assert logged(board, "slowest rank, time to the median")[STEPS] > 1.2
