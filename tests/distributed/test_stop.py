"""However a run is told to stop, and whatever it does then, the next start goes on bit by bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_trinity import exits
from megatron_trinity.errors import UsageError
from tests.broken_runs import POINTER, STEPS, Outcome, flags_of, train
from tests.checkpoints import check_whole
from tests.crosses import first
from tests.distributed.pool import RankError, RankPools
from tests.steps import recorded
from tests.trainer import write_dataset


def train_and_stop(
    rank: int, world_size: int, flags: Sequence[str], steps: Path, where: str, number: int
) -> Outcome:
    """Train, and send a signal to the last rank alone, in the middle of something."""
    from megatron.training import ft_integration, training

    from megatron_trinity.training import checkpoints, pretrain

    owner, name = {
        "step 2": (training, "forward_step_calc_loss"),
        "evaluation": (ft_integration, "on_eval_step_end"),
        "save": (checkpoints, "nonfinite_value"),
        "data": (pretrain, "dataset_provider"),
        "set-up": (pretrain, "set_up_optimizer"),
    }.get(where, (training, "train_step"))
    original, calls = getattr(owner, name), [0]

    def send_within(*args: Any) -> Any:
        provider = original(*args)

        def provide(*args: Any, **kwargs: Any) -> Any:
            os.kill(os.getpid(), number)
            provided = provider(*args, **kwargs)
            steps.with_name("provided").touch()
            return provided

        return provide

    def send_and_call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if rank == world_size - 1 and calls[0] == (2 if where == "step" else 1):
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, send_within if where == "data" else send_and_call)
    try:
        return train(rank, world_size, flags, steps)
    finally:
        setattr(owner, name, original)


CASES: list[tuple[str, int, tuple[str, ...], int]] = [
    ("step", signal.SIGUSR1, (), 2),
    ("evaluation", signal.SIGTERM, ("--eval-interval", "1", "--eval-iters", "50"), 1),
    ("save", signal.SIGINT, ("--save-interval", "2"), 2),
    ("save", signal.SIGTERM, ("--save-interval", "2", "--async-save"), 2),
    ("step", signal.SIGUSR2, ("--exit-signal", "SIGUSR2", "--optimizer", "muon"), 2),
    ("step", signal.SIGTERM, ("--pipeline-model-parallel-size", "2"), 2),
]


@pytest.mark.parametrize(("where", "number", "flags", "newest"), first(1, CASES))
def test_one_rank_is_told_and_all_leave(
    ranks: RankPools, tmp_path: Path, where: str, number: int, flags: tuple[str, ...], newest: int
) -> None:
    write_dataset(tmp_path / "data")
    whole = [*flags_of(tmp_path, tmp_path / "whole"), *flags, "--eval-interval", "1000"]
    assert ranks.run(train, whole, tmp_path / "steps", world_size=2)[0][0] == 0
    run = [*flags_of(tmp_path, tmp_path / "run", "--save-interval", "100"), *flags]
    outcomes = ranks.run(train_and_stop, run, tmp_path / "halves", where, number, world_size=2)
    assert [outcome[:2] for outcome in outcomes] == [(exits.of_signal(number), "")] * 2
    said = f"stopped by {signal.Signals(number).name} behind iteration {newest}: saved"
    assert said in outcomes[0][2]
    assert (tmp_path / "run" / POINTER).read_text() == str(newest)
    check_whole(tmp_path / "run" / f"iter_{newest:07d}", checksums=True)
    again = [*run, "--eval-interval", "1000"]
    assert ranks.run(train, again, tmp_path / "halves", world_size=2)[0][0] == 0
    assert recorded(tmp_path / "halves") == recorded(tmp_path / "steps")
    assert len(recorded(tmp_path / "halves")) == STEPS


@pytest.mark.parametrize("where", first(1, ["data", "set-up"]))
def test_before_the_first_step_nothing_is_written(
    ranks: RankPools, tmp_path: Path, where: str
) -> None:
    write_dataset(tmp_path / "data")
    run = flags_of(tmp_path, tmp_path / "run")
    number = signal.SIGTERM
    [outcome] = ranks.run(train_and_stop, run, tmp_path / "steps", where, number, world_size=1)
    assert outcome[:2] == (exits.of_signal(number), "")
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "provided").exists() == (where == "data")  # not interrupted
    assert ranks.run(train, run, world_size=1)[0][:2] == (0, "")


def train_slowly(rank: int, world_size: int, flags: Sequence[str]) -> None:
    """Train, be told to stop, and never come to the end of the step."""
    import time

    from megatron.training import training

    def step(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    training.train_step = step
    # The hooks are around what is replaced here.
    from megatron_trinity.training import leaving

    leaving_of: list[Any] = []
    original = leaving.Leaving.__init__

    def noted(self: Any, args: Any, stop: Any) -> None:
        original(self, args, stop)
        leaving_of.append(self)
        stop.has_begun = True

    setattr(leaving.Leaving, "__init__", noted)
    train(rank, world_size, flags)


def test_a_run_that_does_not_come_to_the_end_of_a_step_leaves_in_time(
    ranks: RankPools, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "data")
    flags = flags_of(tmp_path, tmp_path / "run", "--exit-within", "1")
    with pytest.raises(RankError) as failed:
        ranks.run(train_slowly, flags, world_size=1)
    assert f"exit code {exits.TOO_LATE}" in failed.value.failures[0]
    assert "error: not saved within 1 s of SIGTERM" in failed.value.failures[0]


def test_megatrons_flags_are_refused(ranks: RankPools, tmp_path: Path) -> None:
    for flag in ("--exit-signal-handler", "--exit-signal-handler-for-training"):
        code, error, _ = ranks.run(train, flags_of(tmp_path, tmp_path / "run", flag), world_size=1)[
            0
        ]
        assert code == UsageError.exit_code
        assert "SIGTERM, SIGUSR1 and SIGINT save and end a run by default" in error
