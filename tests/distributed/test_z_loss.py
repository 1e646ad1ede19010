"""Training with z-loss: weights and logs do not depend on the layout or the micro-batch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.crosses import first
from tests.distributed.pool import RankPools
from tests.trainer import (
    FULL_RECOMPUTE,
    VOCAB_SIZE,
    checkpoint_contents,
    logged,
    run_trainer,
    training_flags,
    write_dataset,
)

STEPS = 3
GLOBAL_VALUES = ("lm loss", "z loss", "mean logit", "max logit")
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", "2")
CHUNKS = ("--loss-chunk-size", "7")
OVERLAPS = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
# World size, micro-batch size and further flags; the reference is one rank with micro-batches of 2.
CASES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "recompute, chunks": (1, 2, (*FULL_RECOMPUTE, *CHUNKS)),
    "DP 2, micro-batch 4, overlaps, chunks": (2, 4, (*OVERLAPS, *CHUNKS)),
    "TP 2, SP, chunks": (2, 2, (*TP2, *CHUNKS)),
    "PP 2, VPP 2, micro-batch 1": (2, 1, (*PP2, "--num-layers-per-virtual-pipeline-stage", "1")),
    "micro-batch 1": (1, 1, ()),
    "micro-batch 4": (1, 4, ()),
    "DP 2": (2, 2, ()),
    "recompute": (1, 2, FULL_RECOMPUTE),
    "TP 2, SP": (2, 2, TP2),
    "PP 2, one token a chunk": (2, 2, (*PP2, "--loss-chunk-size", "1")),
    "PP 2": (2, 2, PP2),
}


class Run:
    """A training run that has ended."""

    def __init__(
        self, ranks: RankPools, data: Path, run: Path, *flags: str, world_size: int = 1
    ) -> None:
        argv = training_flags(
            data,
            *("--train-iters", str(STEPS), "--save", str(run), "--save-interval", str(STEPS)),
            # A large epsilon: Adam's first steps would else be the signs of rounding errors.
            *("--optimizer", "adam", "--adam-eps", "1e-3", "--lr-warmup-iters", "0"),
            *("--eod-mask-loss", "--eval-interval", str(STEPS), "--tensorboard-dir", f"{run}-log"),
            *("--make-vocab-size-divisible-by", "1"),
            *flags,
        )
        assert ranks.run(run_trainer, argv, world_size=world_size) == [0] * world_size
        self._path = run

    def weights(self) -> dict[str, Tensor]:
        contents = checkpoint_contents(self._path, STEPS)
        return {
            key: tensor
            for key, tensor in contents.items()
            if "weight" in key and not key.startswith("optimizer.")
        }

    def values(self, tag: str) -> list[float]:
        """The value of each step."""
        values = logged(Path(f"{self._path}-log"), tag)
        return [values[step] for step in sorted(values)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("z-loss") / "data"
    write_dataset(path)
    return path


@pytest.fixture(scope="module")
def reference(ranks: RankPools, data: Path) -> Run:
    return Run(ranks, data, data.parent / "reference", "--z-loss-coeff", "1e-2")


@pytest.fixture(scope="module")
def without(ranks: RankPools, data: Path) -> Run:
    return Run(ranks, data, data.parent / "without")


@pytest.mark.parametrize("case", first(2, CASES))
def test_z_loss_does_not_depend_on_the_layout(
    ranks: RankPools, data: Path, tmp_path: Path, reference: Run, without: Run, case: str
) -> None:
    world_size, size, flags = CASES[case]
    flags = ("--z-loss-coeff", "1e-2", "--micro-batch-size", str(size), *flags)
    run = Run(ranks, data, tmp_path / "run", *flags, world_size=world_size)

    for tag in (*GLOBAL_VALUES, *["batch heterogeneity"] * (size == 2)):
        values = run.values(tag)
        assert len(values) == STEPS
        assert values == pytest.approx(reference.values(tag), rel=1e-5, abs=1e-6), tag
    validation = run.values("lm loss validation")
    assert validation == pytest.approx(reference.values("lm loss validation"), rel=1e-6)

    weights, expected, other = run.weights(), reference.weights(), without.weights()
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():
        error = (weights[key] - tensor).norm()
        effect = (other[key] - tensor).norm()
        assert error <= 1e-6 * tensor.norm(), key
        assert error <= 1e-2 * effect, key


def test_what_is_logged_with_z_loss_and_without(reference: Run, without: Run) -> None:
    # The first step sees the same weights.
    for tag in ("lm loss", "mean logit", "max logit", "batch heterogeneity"):
        assert reference.values(tag)[0] == without.values(tag)[0], tag
    # Logits vary by less than 1 at first: logsumexp is near the logarithm of the vocabulary's size.
    assert reference.values("z loss")[0] == pytest.approx(
        1e-2 * math.log(VOCAB_SIZE) ** 2, rel=0.05
    )
    with pytest.raises(KeyError):
        without.values("z loss")
    with pytest.raises(KeyError):
        reference.values("z loss validation")


@pytest.mark.slow
def test_z_loss_starts_at_its_iteration_and_after_a_resume(
    ranks: RankPools, data: Path, tmp_path: Path, reference: Run, without: Run
) -> None:
    flags = ("--z-loss-coeff", "1e-2", "--z-loss-start-iteration", "3")
    whole = Run(ranks, data, tmp_path / "whole", *flags)
    assert whole.values("lm loss") == without.values("lm loss")
    assert whole.values("lm loss") != reference.values("lm loss")
    [z_loss] = whole.values("z loss")
    assert z_loss > 0

    load = ("--load", str(tmp_path / "halves"))
    Run(ranks, data, tmp_path / "halves", *flags, *load, "--exit-interval", "2")
    halves = Run(ranks, data, tmp_path / "halves", *flags, *load)
    assert halves.values("z loss") == [z_loss]
    for key, tensor in whole.weights().items():
        assert torch.equal(halves.weights()[key], tensor), key
    assert any(not torch.equal(t, without.weights()[k]) for k, t in whole.weights().items())
