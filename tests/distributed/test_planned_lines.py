"""The plan in the log of a run: at start, and beside what its first step shows."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from tests.distributed.pool import RankPools
from tests.trainer import run_trainer, training_flags, write_dataset

LAYOUT = ("--pipeline-model-parallel-size", "2", "--bf16", "--optimizer", "muon")


def log_of(rank: int, world_size: int, flags: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run_trainer(rank, world_size, flags) == 0
    return out.getvalue()


def test_plan_and_measurement(ranks: RankPools, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    flags = training_flags(tmp_path / "data", *LAYOUT, "--train-iters", "3", "--eval-iters", "0")
    first, second = ranks.run(log_of, flags, world_size=2)
    opening = " ".join(first.split())  # the rows of its table are broken into lines
    # 4 layers of 16,672 beside their MLPs, one of 18,432 and three of 83,456; embedding and head.
    assert "parameters 356k, 190k of them for a token" in opening
    [moment] = re.findall(
        r"memory planned for the fullest rank \(stage 1\): weights [\d.]+ kB, .*?; "
        r"peak [\d.]+ [kM]B, in (.*?) data ",
        opening,
    )
    assert moment == "the backward pass, 1 in flight"
    [measured] = re.findall(r"> plan and measured, rank 0: .*", first)
    for part in ("weights", "gradients", "optimizer"):
        assert re.search(rf"{part} [\d.]+ [kM]B as planned", measured)
    for log in (first, second):
        assert "heoretical" not in log
        assert "in billions" not in log
    assert "plan" not in second
