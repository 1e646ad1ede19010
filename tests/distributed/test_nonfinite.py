"""A step that is not finite is neither applied nor saved, and the next start goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.broken_runs import Outcome, flags_of, listing, train
from tests.distributed.pool import RankPools
from tests.trainer import write_dataset


def train_nan(rank: int, world_size: int, flags: Sequence[str]) -> Outcome:
    """Train with gradients that are NaN from the first step on."""
    from megatron.training import training

    original = training.train_step

    def step(*args: Any, **kwargs: Any) -> Any:
        optimizer = args[3]
        real = optimizer.step

        def poisoned() -> Any:
            for chunk in args[2]:
                next(chunk.parameters()).main_grad.fill_(float("nan"))
            return real()

        optimizer.step = poisoned
        try:
            return original(*args, **kwargs)
        finally:
            del optimizer.step

    training.train_step = step
    try:
        return train(rank, world_size, flags)
    finally:
        training.train_step = original


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_the_first_step_after_a_start(ranks: RankPools, tmp_path: Path, optimizer: str) -> None:
    write_dataset(tmp_path / "data")
    run = tmp_path / "run"
    flags = flags_of(tmp_path, run, "--optimizer", optimizer)
    first = ranks.run(train, [*flags, "--exit-interval", "1"], world_size=1)[0]
    assert first[:2] == (0, "")
    before = listing(run)
    code, error, _ = ranks.run(train_nan, flags, world_size=1)[0]
    assert (code, error[:42]) == (3, "the gradient norm of iteration 2 is nan; n")
    assert listing(run) == before
    assert ranks.run(train, flags, world_size=1)[0][:2] == (0, "")


def test_injected_errors_leave_the_checkpoint_before(ranks: RankPools, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    flags = flags_of(tmp_path, tmp_path / "run")
    injected = ["--error-injection-rate", "3", "--error-injection-type", "persistent_error"]
    code, error, _ = ranks.run(train, [*flags, *injected], world_size=1)[0]
    assert (code, error.startswith("iteration ")) == (3, True), error
    assert ranks.run(train, flags, world_size=1)[0][:2] == (0, "")
