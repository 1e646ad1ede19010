"""In the `torch` format too a checkpoint is whole or nothing, and one of its run's layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_trinity.checkpoint.rank_files.checkpoint import rank_files
from megatron_trinity.checkpoint.whole.manifest import MANIFEST
from tests.broken_runs import (
    NEWEST,
    POINTER,
    STEPS,
    flags_of,
    listing,
    names,
    small_disk,
    train,
    train_whole_and_stopped,
    warnings_of,
)
from tests.checkpoints import Payload, check_whole, flip_bit
from tests.distributed.pool import RankPools
from tests.steps import recorded

FILE = "mp_rank_00/model_optim_rng.pt"
TORCH = ("--ckpt-format", "torch")
TENSOR_PARALLEL = ("--tensor-model-parallel-size", "2", "--sequence-parallel")


@pytest.fixture(scope="module")
def folder(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a run of all steps in the other format, and one that has been stopped at 3."""
    folder = tmp_path_factory.mktemp("rank files")
    train_whole_and_stopped(ranks, folder, *TORCH)
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run that a test may break."""
    shutil.copytree(folder / "stopped", tmp_path / "run")
    return tmp_path / "run"


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def _payload(file: Path) -> None:
    torch.save({"args": Payload(file.parents[2] / "mark")}, file)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped bit": (flip_bit, f"{FILE} has another content than was saved"),
    "truncated file": (_truncate, f"{FILE} has "),
    "missing file": (lambda file: file.unlink(), f"{FILE} is missing"),
    "payload": (_payload, f"{FILE} has "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_skipped(
    ranks: RankPools, folder: Path, run: Path, tmp_path: Path, fault: str
) -> None:
    break_, words = FAULTS[fault]
    break_(run / NEWEST / FILE)
    outcome = ranks.run(train, flags_of(folder, run, *TORCH), tmp_path / "steps", world_size=1)[0]
    assert outcome[:2] == (0, "")
    (warning,) = warnings_of(outcome)
    assert warning.startswith(f"WARNING: skipped {run / NEWEST}: {words}")
    assert recorded(tmp_path / "steps") == recorded(folder / "steps")[2:]
    for number in range(1, STEPS + 1):
        check_whole(run / f"iter_{number:07d}", checksums=True)
    assert (run / POINTER).read_text() == str(STEPS)
    assert not (run / "mark").exists()


@pytest.mark.parametrize(
    ("break_", "words"),
    [(_truncate, f"{FILE} is missing or cut off"), (_payload, "nothing was executed")],
)
def test_an_iteration_without_a_manifest(
    ranks: RankPools,
    folder: Path,
    run: Path,
    tmp_path: Path,
    break_: Callable[[Path], None],
    words: str,
) -> None:
    """It loads if it is named, as one that another program has saved, and is not broken."""
    (run / NEWEST / MANIFEST).unlink()
    flags = [*flags_of(folder, run, *TORCH, "--save", str(tmp_path / "new")), "--ckpt-step", "3"]
    outcome = ranks.run(train, flags, tmp_path / "steps", world_size=1)[0]
    assert outcome[:2] == (0, "")
    assert f"WARNING: nothing says whether {run / NEWEST} is whole" in outcome[2]
    assert recorded(tmp_path / "steps") == recorded(folder / "steps")[3:]
    shutil.rmtree(tmp_path / "new")
    break_(run / NEWEST / FILE)
    before = listing(run)
    code, error, _ = ranks.run(train, flags, world_size=1)[0]
    assert code == 1
    assert words in error
    assert "\n" not in error
    assert listing(run) == before
    assert not (run / "mark").exists()


def test_another_layout_is_refused(ranks: RankPools, folder: Path, run: Path) -> None:
    other = flags_of(folder, run, *TORCH, *TENSOR_PARALLEL)
    for code, error, _ in ranks.run(train, other, world_size=2):
        assert code == 2
        assert "--tensor-model-parallel-size is 1 there and 2 here" in error
        assert "--auto-detect-ckpt-format" in error


def test_the_other_format_needs_a_flag_and_moves_anywhere(
    ranks: RankPools, folder: Path, run: Path, tmp_path: Path
) -> None:
    before = listing(run)
    code, error, _ = ranks.run(train, flags_of(folder, run), world_size=1)[0]
    assert code == 2
    assert "is in --ckpt-format torch, and this run has torch_dist" in error
    assert listing(run) == before

    converted = flags_of(folder, run, "--auto-detect-ckpt-format")
    outcome = ranks.run(train, converted, tmp_path / "steps", world_size=1)[0]
    assert outcome[:2] == (0, "")
    assert recorded(tmp_path / "steps") == recorded(folder / "steps")[3:]
    assert not rank_files(run / f"iter_{STEPS:07d}")

    longer = ("--train-iters", str(STEPS + 1), "--override-opt-param-scheduler")
    moved = flags_of(folder, run, *TENSOR_PARALLEL, *longer)
    outcomes = ranks.run(train, moved, tmp_path / "moved", world_size=2)
    assert [outcome[:2] for outcome in outcomes] == [(0, "")] * 2
    assert [number for number, _ in recorded(tmp_path / "moved")] == [STEPS + 1]


@pytest.mark.parametrize("more", [[], ["--auto-detect-ckpt-format"]])
def test_whole_tensors_are_no_files_of_ranks(
    ranks: RankPools, folder: Path, more: list[str]
) -> None:
    before = listing(folder / "whole")
    flags = flags_of(folder, folder / "whole", *TORCH, *more)
    code, error, _ = ranks.run(train, flags, world_size=1)[0]
    assert code == 2
    assert "is in --ckpt-format torch_dist, and this run has torch" in error
    assert "tools/reshard.py --format torch" in error
    assert listing(folder / "whole") == before


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [(("--expert-model-parallel-size", "2"), "muon"), (TENSOR_PARALLEL, "adam")],
)
def test_a_run_of_two_ranks_goes_on_bitwise(
    ranks: RankPools, folder: Path, tmp_path: Path, layout: tuple[str, ...], optimizer: str
) -> None:
    kind = (*TORCH, *layout, "--optimizer", optimizer, "--keep-last-checkpoints", "2")
    for name, flags in (("whole", ()), ("halves", ("--exit-interval", "2")), ("halves", ())):
        argv = flags_of(folder, tmp_path / name, *kind, *flags)
        outcomes = ranks.run(train, argv, tmp_path / f"{name} steps", world_size=2)
        assert [outcome[:2] for outcome in outcomes] == [(0, "")] * 2
    assert len(recorded(tmp_path / "whole steps")) == STEPS
    assert recorded(tmp_path / "halves steps") == recorded(tmp_path / "whole steps")
    kept = {"iter_0000003", "iter_0000004", POINTER}
    assert names(tmp_path / "halves") == kept
    for name in ("iter_0000003", "iter_0000004"):
        check_whole(tmp_path / "halves" / name, checksums=True)


def test_a_disk_that_is_full(ranks: RankPools, folder: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", folder / "stopped" / NEWEST) as disk:
        run = disk / "run"
        code, error, _ = ranks.run(train, flags_of(folder, run, *TORCH), world_size=1)[0]
        assert code == 1
        assert f"iteration 3 could not be saved: the disk of {run} is full" in error
        for number in (1, 2):
            check_whole(run / f"iter_{number:07d}", checksums=True)
        assert not (run / NEWEST / MANIFEST).exists()
