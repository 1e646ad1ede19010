"""A run of N steps, and one that is stopped at N/2 and resumed, end bitwise alike."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tests.distributed.pool import RankPools
from tests.trainer import checkpoint_contents, logged, run_trainer, training_flags, write_dataset

STEPS = 6
HALF = STEPS // 2
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "expert parallel": (2, ["--expert-model-parallel-size", "2"]),
    "distributed optimizer": (2, ["--use-distributed-optimizer"]),
    "tensor parallel": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pipeline parallel": (2, ["--pipeline-model-parallel-size", "2"]),
}
OPTIMIZERS = ["adam", "muon"]
PRECISIONS: dict[str, list[str]] = {"fp32": [], "bf16": ["--bf16"]}
# Every pair of an optimizer and a precision where state is split over ranks, two of them elsewhere.
CASES = [
    *itertools.product(("expert parallel", "distributed optimizer"), OPTIMIZERS, PRECISIONS),
    ("tensor parallel", "adam", "fp32"),
    ("tensor parallel", "muon", "bf16"),
    ("pipeline parallel", "adam", "bf16"),
    ("pipeline parallel", "muon", "fp32"),
]


@pytest.mark.parametrize(("layout", "optimizer", "precision"), CASES)
def test_resume_is_exact(
    ranks: RankPools, tmp_path: Path, layout: str, optimizer: str, precision: str
) -> None:
    world_size, layout_flags = LAYOUTS[layout]
    write_dataset(tmp_path / "data")

    def train(name: str, *flags: str) -> None:
        argv = training_flags(
            tmp_path / "data",
            *layout_flags,
            *PRECISIONS[precision],
            *("--optimizer", optimizer, "--train-iters", str(STEPS)),
            *("--save", str(tmp_path / name), "--load", str(tmp_path / name)),
            *("--save-interval", str(STEPS), "--tensorboard-dir", str(tmp_path / f"{name}-log")),
            *("--data-cache-path", str(tmp_path / "cache")),
            *flags,
        )
        assert ranks.run(run_trainer, argv, world_size=world_size) == [0] * world_size

    train("whole")
    train("halves", "--exit-interval", str(HALF))
    train("halves")

    whole = checkpoint_contents(tmp_path / "whole", STEPS)
    halves = checkpoint_contents(tmp_path / "halves", STEPS)
    assert whole.keys() == halves.keys()
    assert any("exp_avg" in key or "momentum" in key for key in whole), sorted(whole)
    differing = [key for key in whole if not torch.equal(whole[key], halves[key])]
    assert differing == []
    for tag in ("lm loss", "grad-norm", "learning-rate"):
        values = logged(tmp_path / "whole-log", tag)
        assert sorted(values) == list(range(1, STEPS + 1))
        assert values == logged(tmp_path / "halves-log", tag)
    for tag in ("tokens per second", "peak memory (GiB)"):
        assert all(value > 0 for value in logged(tmp_path / "whole-log", tag).values())
    half = checkpoint_contents(tmp_path / "halves", HALF)
    assert not torch.equal(half["output_layer.weight"], whole["output_layer.weight"])
