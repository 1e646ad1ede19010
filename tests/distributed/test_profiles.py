"""PyTorch's profiler on the CPU: which steps a trace has, where it lies, and after a resume."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_trinity.errors import TrinityError
from tests.distributed.pool import RankPools
from tests.trainer import run_trainer, training_flags, write_dataset

MARK = "ProfilerStep#"


def flags_of(tmp_path: Path, *words: str) -> list[str]:
    write_dataset(tmp_path / "data")
    return training_flags(
        tmp_path / "data",
        *("--profile", "--use-pytorch-profiler", "--tensorboard-dir", str(tmp_path / "log")),
        *words,
    )


def steps_of(tmp_path: Path, rank: int) -> set[int]:
    """The iterations that the trace of a rank has."""
    with gzip.open(tmp_path / "torch_profile" / f"rank-{rank}.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    names = {event.get("name", "") for event in events}
    return {int(name.removeprefix(MARK)) for name in names if name.startswith(MARK)}


@pytest.mark.parametrize(("start", "end"), [(1, 3), (3, 4)])
def test_a_trace_has_the_steps(ranks: RankPools, tmp_path: Path, start: int, end: int) -> None:
    window = ("--profile-step-start", str(start), "--profile-step-end", str(end))
    flags = flags_of(tmp_path, "--train-iters", "4", *window)
    assert ranks.run(run_trainer, flags, world_size=1) == [0]
    assert steps_of(tmp_path, 0) == set(range(start, end))


def test_a_rank_of_two(ranks: RankPools, tmp_path: Path) -> None:
    window = ("--profile-step-start", "1", "--profile-step-end", "2", "--profile-ranks", "1")
    flags = flags_of(tmp_path, "--train-iters", "3", *window)
    assert ranks.run(run_trainer, flags, world_size=2) == [0, 0]
    assert [file.name for file in (tmp_path / "torch_profile").iterdir()] == ["rank-1.json.gz"]
    assert steps_of(tmp_path, 1) == {1}


def refused(rank: int, world_size: int, flags: list[str]) -> tuple[int, str]:
    with pytest.raises(TrinityError) as error:
        run_trainer(rank, world_size, flags)
    return error.value.exit_code, str(error.value)


@pytest.mark.slow
def test_a_run_that_goes_on(ranks: RankPools, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    saving = ("--save", run, "--load", run, "--save-interval", "9", "--train-iters", "6")
    first = flags_of(tmp_path, *saving, "--exit-interval", "2")
    plain = [word for word in first if word not in ("--profile", "--use-pytorch-profiler")]
    assert ranks.run(run_trainer, plain, world_size=1) == [0]
    window = ("--profile-step-start", "1", "--profile-step-end")
    cut_off = [*flags_of(tmp_path, *saving), *window, "3"]
    [(code, line)] = ranks.run(refused, cut_off, world_size=1)
    assert (code, line) == (
        2,
        "--profile-step-end 3: the run goes on at iteration 2, and PyTorch's profiler counts steps "
        "from there; use 2 or less",
    )
    whole = [*flags_of(tmp_path, *saving), *window, "2"]
    assert ranks.run(run_trainer, whole, world_size=1) == [0]
    assert steps_of(tmp_path, 0) == {1}
