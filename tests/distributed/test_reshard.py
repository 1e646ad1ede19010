"""A run goes on from a checkpoint that was rewritten offline as it does from the original."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_trinity.checkpoint.layout_args import parse_layout_text
from megatron_trinity.checkpoint.reshard import reshard
from tests.crosses import first
from tests.distributed.pool import RankPools
from tests.trainer import checkpoint_contents, logged, run_trainer, training_flags, write_dataset

STEPS, HALF = 4, 2
OTHER = (
    *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    *("--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"),
)


class Runs:
    """Runs of two ranks in a directory, over one dataset."""

    def __init__(self, ranks: RankPools, path: Path) -> None:
        self._ranks, self.path = ranks, path
        write_dataset(path / "data")

    def train(self, name: str, *flags: str) -> None:
        argv = training_flags(
            self.path / "data",
            *("--train-iters", str(STEPS), "--save-interval", str(STEPS)),
            *("--save", str(self.path / name), "--load-balancing", "smebu"),
            *("--tensorboard-dir", str(self.path / f"{name}-log")),
            *flags,
        )
        assert self._ranks.run(run_trainer, argv, world_size=2) == [0, 0]


@pytest.fixture(scope="module")
def runs(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With a checkpoint `half` of two steps in one layout, bf16 and Muon."""
    made = Runs(ranks, tmp_path_factory.mktemp("runs"))
    flags = ("--optimizer", "muon", "--bf16", "--use-distributed-optimizer")
    made.train("half", *flags, "--exit-interval", str(HALF))
    return made


def test_another_layout_goes_on_alike(runs: Runs) -> None:
    half, moved = runs.path / "half", runs.path / "moved"
    reshard(half, moved, parse_layout_text("tp=2,ep=2,etp=1"), files=3)
    before, after = (checkpoint_contents(path, HALF) for path in (half, moved))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    flags = ("--optimizer", "muon", "--bf16", *OTHER)
    runs.train("from-half", *flags, "--load", str(half))
    runs.train("from-moved", *flags, "--load", str(moved))
    original, resharded = (
        checkpoint_contents(runs.path / name, STEPS) for name in ("from-half", "from-moved")
    )
    assert original.keys() == resharded.keys() == before.keys()
    differing = [key for key in original if not torch.equal(original[key], resharded[key])]
    assert differing == []
    key = "optimizer.state.fp32_param.output_layer.weight"
    assert not torch.equal(original[key], before[key]), "it was trained"
    for tag in ("lm loss", "grad-norm", "learning-rate"):
        values = logged(runs.path / "from-moved-log", tag)
        assert sorted(values) == [HALF + 1, STEPS]
        assert values == logged(runs.path / "from-half-log", tag)


@pytest.mark.slow
def test_a_file_a_rank_loads_the_same_weights(runs: Runs) -> None:
    half, legacy = runs.path / "half", runs.path / "legacy"
    layout = parse_layout_text("tp=2,ep=2,etp=1")
    reshard(half, legacy, layout, ckpt_format="torch", optimizer=False)
    flags = ("--optimizer", "adam", "--bf16", "--finetune", *OTHER)
    runs.train("tuned", *flags, "--load", str(half))
    runs.train("tuned-legacy", *flags, "--load", str(legacy), "--ckpt-format", "torch")
    for tag in ("lm loss", "grad-norm"):
        values = logged(runs.path / "tuned-legacy-log", tag)
        assert sorted(values) == list(range(1, STEPS + 1))
        assert values == logged(runs.path / "tuned-log", tag)


PIPELINE = ("--pipeline-model-parallel-size", "2")


@pytest.mark.parametrize(
    ("kind", "layout", "layout_flags"),
    first(
        1,
        [
            (("--optimizer", "muon", "--bf16"), "pp=2", PIPELINE),
            (("--optimizer", "adam", "--bf16"), "tp=2,ep=2,etp=1", OTHER),
            (("--optimizer", "muon", "--router-optimizer", "adamw"), "tp=2,ep=2,etp=1", OTHER),
            (("--optimizer", "adam"), "tp=2,ep=2,etp=1", OTHER),
        ],
    ),
)
def test_a_file_a_rank_goes_on_alike(
    ranks: RankPools,
    tmp_path: Path,
    kind: tuple[str, ...],
    layout: str,
    layout_flags: tuple[str, ...],
) -> None:
    runs = Runs(ranks, tmp_path)
    runs.train("half", *kind, "--use-distributed-optimizer", "--exit-interval", str(HALF))
    half, legacy = tmp_path / "half", tmp_path / "legacy"
    reshard(half, legacy, parse_layout_text(layout), ckpt_format="torch")
    flags = (*kind, *layout_flags)
    runs.train("from-half", *flags, "--load", str(half))
    format_flags = ("--ckpt-format", "torch", "--no-load-rng")
    runs.train("from-legacy", *flags, "--load", str(legacy), *format_flags)
    for tag in ("lm loss", "grad-norm", "learning-rate"):
        values = logged(tmp_path / "from-legacy-log", tag)
        assert sorted(values) == [HALF + 1, STEPS]
        assert values == logged(tmp_path / "from-half-log", tag)
