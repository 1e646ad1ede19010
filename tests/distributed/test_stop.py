"""However a run is told to stop, and whatever it does then, the next start goes on bit by bit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
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
from tests.paths import ROOT
from tests.steps import recorded
from tests.trainer import write_dataset

LIMIT = 120.0  # seconds


def train_and_stop(
    rank: int, world_size: int, flags: Sequence[str], steps: Path, where: str, number: int
) -> Outcome:
    """Train, and send a signal to the last rank alone, in the middle of something."""
    from megatron.training import ft_integration, training

    from megatron_trinity.training import checkpoints, leaving, pretrain

    owner, name = {
        "step 2": (training, "forward_step_calc_loss"),
        "evaluation": (ft_integration, "on_eval_step_end"),
        "save": (checkpoints, "nonfinite_value"),
        "data": (pretrain, "dataset_provider"),
        "set-up": (pretrain, "set_up_optimizer"),
        "first exchange": (leaving.Leaving, "ask"),
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
        elif where == "set-up":
            time.sleep(LIMIT)  # and hears of it
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


@pytest.mark.parametrize(
    ("where", "world_size"), first(2, [("data", 1), ("set-up", 2), ("first exchange", 2)])
)
def test_before_the_first_step_nothing_is_written(
    ranks: RankPools, tmp_path: Path, where: str, world_size: int
) -> None:
    """The last rank alone is told."""
    write_dataset(tmp_path / "data")
    run = flags_of(tmp_path, tmp_path / "run")
    number = signal.SIGTERM
    outcomes = ranks.run(
        train_and_stop, run, tmp_path / "steps", where, number, world_size=world_size
    )
    assert [outcome[:2] for outcome in outcomes] == [(exits.of_signal(number), "")] * world_size
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "provided").exists() == (where == "data")  # not interrupted
    assert ranks.run(train, run, world_size=1)[0][:2] == (0, "")


PROGRAM = """
import os
from megatron_trinity.errors import run_command

def main():
    from megatron_trinity.training.stop import stopping
    with stopping():
        from megatron_trinity.upstream import adapt_megatron
        adapt_megatron()
        from megatron_trinity.training.observer import StepObserver
        from megatron_trinity.training.pretrain import pretrain
        step_begins = StepObserver.step_begins
        def told(self, optimizer):
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), 15)
            step_begins(self, optimizer)
        StepObserver.step_begins = told
        pretrain()

run_command(main)
"""


@pytest.mark.slow
def test_a_rank_that_waits_for_one_that_has_left_leaves_with_its_code(tmp_path: Path) -> None:
    """Without torchrun, which would end it."""
    write_dataset(tmp_path / "data")
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [str(tmp_path / "program.py"), *flags_of(tmp_path, tmp_path / "run")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of_launch = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env={**os.environ, **of_launch, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        said = [process.communicate(timeout=LIMIT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [143, 143], said
    assert "stopped by SIGTERM before the first step; nothing was written" in said[0]
    assert "Traceback" not in "".join(said)


def train_slowly(rank: int, world_size: int, flags: Sequence[str]) -> None:
    """Train, be told to stop, and never come to the end of the step."""
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
