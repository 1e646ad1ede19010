"""The trainer in the forms that a GPU takes, against itself as a CPU runs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.crosses import first
from tests.distributed.pool import RankPools
from tests.gpu_forms import as_if_compiled, as_if_flexible, as_if_kernel
from tests.trainer import checkpoint_contents, logged, run_trainer, training_flags, write_dataset

STEPS = 2


def train_in_form(
    rank: int, world_size: int, flags: Sequence[str], as_on_a_gpu: bool
) -> tuple[int, bool, bool]:
    """Exit code, and whether grouped products and block masks were taken."""
    if not as_on_a_gpu:
        return run_trainer(rank, world_size, flags), False, False
    with as_if_kernel() as products, as_if_flexible() as attention, as_if_compiled():
        return run_trainer(rank, world_size, flags), products.called, attention.called


@pytest.mark.parametrize(
    ("world_size", "layout"),
    first(1, [(1, ()), (4, ("--context-parallel-size", "2", "--expert-model-parallel-size", "2"))]),
    ids=["one rank", "CP 2, EP 2"],
)
def test_training_is_the_same_in_either_form(
    ranks: RankPools, tmp_path: Path, world_size: int, layout: tuple[str, ...]
) -> None:
    """Two micro-batches at least, so that gradients add up; a global layer and documents too."""
    write_dataset(tmp_path / "data")
    results = {}
    for name in ("cpu", "gpu"):
        run = tmp_path / name
        argv = training_flags(
            tmp_path / "data",
            *("--train-iters", str(STEPS), "--save", str(run), "--save-interval", str(STEPS)),
            *("--lr-warmup-iters", "0", "--tensorboard-dir", str(run / "log")),
            *("--eval-iters", "0", "--dataloader-inter-document-masking"),
            *("--use-distributed-optimizer", "--adam-eps", "1e-4", "--optimizer", "adam"),
            *layout,
        )
        ended = ranks.run(train_in_form, argv, name == "gpu", world_size=world_size)
        assert ended == [(0, name == "gpu", name == "gpu")] * world_size
        scalars = {tag: logged(run / "log", tag) for tag in ("lm loss", "grad-norm")}
        results[name] = scalars, checkpoint_contents(run, STEPS)
    (have, tensors), (want, expected) = results["gpu"], results["cpu"]
    for tag, steps in want.items():
        assert len(steps) == STEPS
        assert have[tag] == pytest.approx(steps, rel=1e-5), tag
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        if not key.startswith("rng_state"):
            torch.testing.assert_close(tensors[key], tensor, rtol=1e-4, atol=2e-6, msg=key)
