"""The optimizer's state moves from any layout to any other: key by key, and in what comes next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.crosses import first
from tests.distributed.pool import RankPools
from tests.distributed.test_muon import LAYOUTS, hf_tensors
from tests.optimizer import (
    Part,
    build_adam,
    build_optimizer,
    canonical_shapes,
    held_weights,
    random_tensors,
    set_gradients,
    whole,
)
from tests.trainer import checkpoint_contents

MOVES = [
    ("TP 2, PP 2, EP 2, DP 2 sharded", "DP 3 sharded"),
    ("DP 3 sharded", "TP 4, more than query groups"),
    ("PP 2", "CP 2 sharded"),
    ("DP 4, two instances", "TP 2, ETP 2, EP 2, DP 2 sharded"),
    ("one rank", "TP 2, PP 2, EP 2, DP 2 sharded"),
    ("TP 2, PP 2, EP 2, DP 2 sharded", "one rank"),
    ("EP 4, DP 4 sharded", "DP 2"),
    ("TP 8", "EP 2"),
]
ADAM = {
    "one rank": (1, ()),
    "EP 2": (2, ("--expert-model-parallel-size", "2")),
    "DP 2 sharded": (2, ("--use-distributed-optimizer",)),
    "bf16, DP 2 sharded": (2, ("--bf16", "--use-distributed-optimizer")),
    "bf16, PP 2": (2, ("--bf16", "--pipeline-model-parallel-size", "2")),
    "TP 2, EP 2, DP 2 sharded": (
        4,
        (
            *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
            *("--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"),
            "--use-distributed-optimizer",
        ),
    ),
    "bf16, TP 2, PP 2": (
        4,
        (
            *("--bf16", "--tensor-model-parallel-size", "2", "--sequence-parallel"),
            *("--pipeline-model-parallel-size", "2"),
        ),
    ),
}
ADAM_MOVES = [
    ("one rank", "TP 2, EP 2, DP 2 sharded"),
    ("DP 2 sharded", "one rank"),
    ("bf16, DP 2 sharded", "bf16, TP 2, PP 2"),
    ("bf16, PP 2", "TP 2, EP 2, DP 2 sharded"),
    ("TP 2, EP 2, DP 2 sharded", "EP 2"),
    ("EP 2", "DP 2 sharded"),
    ("bf16, TP 2, PP 2", "bf16, DP 2 sharded"),
    ("bf16, DP 2 sharded", "one rank"),
    ("TP 2, EP 2, DP 2 sharded", "bf16, TP 2, PP 2"),
    ("EP 2", "bf16, DP 2 sharded"),
]
MAKERS = {"muon": build_optimizer, "adam": build_adam}
STEPS = 2  # before the checkpoint


def step(
    rank_model: object, optimizer: object, shapes: dict[str, tuple[int, ...]], seed: int
) -> None:
    set_gradients(rank_model, random_tensors(shapes, seed=seed))
    optimizer.step()  # type: ignore[attr-defined]


def saved_state(model: object, optimizer: object, is_loading: bool = False) -> dict[str, object]:
    """As training has it: the model's own state as well, which may be what the optimizer holds."""
    of_model = model.sharded_state_dict()  # type: ignore[attr-defined]
    state = optimizer.sharded_state_dict(of_model, is_loading)  # type: ignore[attr-defined]
    return {"model": of_model, "optimizer": state}


def train_and_save(
    rank: int,
    world_size: int,
    maker: str,
    flags: Sequence[str],
    shapes: dict[str, tuple[int, ...]],
    directory: Path,
) -> list[Part]:
    """Two steps, a checkpoint, a third step; returns the weights."""
    from megatron.core import dist_checkpointing

    model, optimizer = MAKERS[maker](flags, random_tensors(shapes, seed=1))
    for number in range(STEPS):
        step(model, optimizer, shapes, seed=2 + number)
    dist_checkpointing.save(saved_state(model, optimizer), str(directory))
    step(model, optimizer, shapes, seed=2 + STEPS)
    return held_weights(model)


def load_and_go_on(
    rank: int,
    world_size: int,
    maker: str,
    flags: Sequence[str],
    shapes: dict[str, tuple[int, ...]],
    directory: Path,
    again: Path,
) -> list[Part]:
    """Load, save what was loaded, and take the third step; returns the weights."""
    from megatron.core import dist_checkpointing

    model, optimizer = MAKERS[maker](flags, random_tensors(shapes, seed=9))
    state = dist_checkpointing.load(saved_state(model, optimizer, is_loading=True), str(directory))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    dist_checkpointing.save(saved_state(model, optimizer), str(again))
    step(model, optimizer, shapes, seed=2 + STEPS)
    return held_weights(model)


def moved(
    ranks: RankPools,
    tmp_path: Path,
    source: tuple[int, Sequence[str]],
    target: tuple[int, Sequence[str]],
    maker: str = "muon",
    target_ranks: RankPools | None = None,
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """State saved and saved again; weights after the third step, of the source and the target.

    `target_ranks` go on where `ranks` have saved; by default they do so themselves.
    """
    [shapes] = ranks.run(canonical_shapes, world_size=1)
    saved, again = tmp_path / "saved" / "iter_0000002", tmp_path / "again" / "iter_0000002"
    for directory in (saved, again):
        directory.mkdir(parents=True)
    world_size, flags = source
    first = ranks.run(train_and_save, maker, flags, shapes, saved, world_size=world_size)
    world_size, flags = target
    second = (target_ranks or ranks).run(
        load_and_go_on, maker, flags, shapes, saved, again, world_size=world_size
    )
    states = [
        {
            key: tensor
            for key, tensor in checkpoint_contents(path.parent, 2).items()
            if key.startswith("optimizer.")
        }
        for path in (saved, again)
    ]
    weights = [whole(shapes, [p for parts in answer for p in parts]) for answer in (first, second)]
    return states, [hf_tensors(tensors) for tensors in weights]


@pytest.mark.parametrize(("source", "target"), first(1, MOVES))
def test_state_moves_between_layouts(
    ranks: RankPools, tmp_path: Path, source: str, target: str
) -> None:
    (saved, again), (went_on, resumed) = moved(ranks, tmp_path, LAYOUTS[source], LAYOUTS[target])
    assert saved.keys() == again.keys()
    kinds = {key.split(".")[2] for key in saved}
    assert kinds == {"fp32_param", "momentum_buffer", "exp_avg", "exp_avg_sq"}
    for key, tensor in saved.items():
        assert torch.equal(tensor, again[key]), key
        assert tensor.abs().max() > 0, key
    for name, tensor in went_on.items():
        assert (resumed[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name


@pytest.mark.parametrize(
    "precisions", [("--bf16", None), (None, "--bf16")], ids=["to fp32", "to bf16"]
)
def test_state_moves_between_precisions(
    ranks: RankPools, tmp_path: Path, precisions: tuple[str | None, str | None]
) -> None:
    """fp32 weights are in every checkpoint, so none are rounded on the way."""
    (size, before), (other_size, after) = LAYOUTS["DP 2 sharded"], LAYOUTS["TP 2, DP 2 sharded"]
    source = (size, (*before, *filter(None, precisions[:1])))
    target = (other_size, (*after, *filter(None, precisions[1:])))
    (saved, again), (went_on, resumed) = moved(ranks, tmp_path, source, target)
    assert saved.keys() == again.keys()
    for key, tensor in saved.items():
        assert torch.equal(tensor, again[key]), key
    for name, tensor in went_on.items():  # one of the two is rounded to bf16
        assert (resumed[name] - tensor).abs().max() <= 2**-7 * tensor.abs().max(), name


@pytest.mark.parametrize(("source", "target"), first(1, ADAM_MOVES))
def test_state_of_adam_moves(ranks: RankPools, tmp_path: Path, source: str, target: str) -> None:
    """Between layouts, sharded or not, and precisions: Megatron's own optimizers, three of them."""
    (saved, again), (went_on, resumed) = moved(
        ranks, tmp_path, ADAM[source], ADAM[target], maker="adam"
    )
    assert saved.keys() == again.keys()
    assert {key.split(".")[2] for key in saved} == {"fp32_param", "exp_avg", "exp_avg_sq"}
    for key, tensor in saved.items():
        assert torch.equal(tensor, again[key]), key
        assert tensor.abs().max() > 0, key
    tolerance = 2**-7 if "bf16" in source or "bf16" in target else 1e-6
    for name, tensor in went_on.items():
        assert (resumed[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name
