"""One model, one answer: every layout of the table trains as one rank does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed.layouts import (
    AXES,
    GLOBAL_BATCH,
    HEADS,
    LAYOUTS,
    QUERY_GROUPS,
    QUICK,
    Layout,
    can_meet,
    flags,
    is_possible,
    ranks_of,
)
from tests.distributed.pool import RankPools
from tests.trainer import checkpoint_contents, logged, run_trainer, training_flags, write_dataset

OVERLAPS = ("--overlap-grad-reduce", "--overlap-param-gather", "--ddp-num-buckets", "4")
STEPS = 2  # the second after an update
SCALARS = ("lm loss", "grad-norm", "sequence loss", "z loss", "max violation")


@dataclass
class Answer:
    """What a run leaves behind.

    Attributes:
        scalars: tag to step to value.
        tensors: weights, expert biases, and first moments and momenta, which are sums of gradients.
    """

    scalars: dict[str, dict[int, float]]
    tensors: dict[str, Tensor]


def train(
    ranks: RankPools, data: Path, run: Path, layout: Layout, more: Sequence[str] = ()
) -> Answer:
    argv = training_flags(
        data,
        *("--num-attention-heads", str(HEADS), "--num-query-groups", str(QUERY_GROUPS)),
        *("--kv-channels", "8", "--global-batch-size", str(GLOBAL_BATCH)),
        *("--train-iters", str(STEPS), "--lr-warmup-iters", "0"),
        *("--save", str(run), "--save-interval", str(STEPS)),
        *("--tensorboard-dir", str(run / "log"), "--eval-iters", "0"),
        *("--seq-aux-loss-coeff", "0.01", "--z-loss-coeff", "1e-3"),
        *("--moe-router-bias-update-rate", "0.01", "--optimizer", "adam", "--lr", "5e-4"),
        # Else the first steps would be the signs of rounding errors where gradients vanish.
        *("--adam-eps", "1e-4"),
        *flags(layout),
        *more,
    )
    world_size = ranks_of(layout)
    assert ranks.run(run_trainer, argv, world_size=world_size) == [0] * world_size
    contents = checkpoint_contents(run, STEPS)
    return Answer(
        scalars={tag: logged(run / "log", tag) for tag in SCALARS},
        tensors={
            key: tensor
            for key, tensor in contents.items()
            if not key.startswith("optimizer.") or re.search(r"\.(exp_avg|momentum_buffer)\.", key)
            if not key.startswith("rng_state")
        },
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layouts") / "data"
    write_dataset(path)
    return path


@pytest.fixture(scope="module")
def references(
    ranks: RankPools, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Layout, Answer]:
    return answers_of_one_rank(ranks, data, tmp_path_factory.mktemp("references"))


def answers_of_one_rank(ranks: RankPools, data: Path, path: Path) -> dict[Layout, Answer]:
    """By what a layout's answer depends on, its data and its optimizer; see `kind_of`."""
    kinds: list[Layout] = [(), ("documents",), ("muon",), ("documents", "muon")]
    return {kind: train(ranks, data, path / "-".join(("run", *kind)), kind) for kind in kinds}


def kind_of(layout: Layout) -> Layout:
    """The one-rank layout whose answer it has to give."""
    return tuple(name for name in ("documents", "muon") if name in layout)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(x, id=" | ".join(x), marks=[pytest.mark.slow] * (x not in QUICK))
        for x in LAYOUTS
    ],
)
def test_a_layout_gives_the_answer_of_one_rank(
    ranks: RankPools,
    data: Path,
    references: dict[Layout, Answer],
    tmp_path: Path,
    layout: Layout,
) -> None:
    got = train(ranks, data, tmp_path / "run", layout)
    check(got, references[kind_of(layout)], layout)


PADDED: tuple[Layout, ...] = (
    ("TP 2 + SP", "documents"),
    ("CP 2 all-gather", "documents"),
    ("PP 2", "documents", "full recompute"),
    ("EP 2", "DP 2", "documents", "micro-batch 4"),
)


@pytest.mark.slow
def test_rows_with_padding_give_the_answer_of_one_rank(
    ranks: RankPools, data: Path, references: dict[Layout, Answer], tmp_path: Path
) -> None:
    padded = ("--packing", "best-fit")
    expected = train(ranks, data, tmp_path / "one", ("documents",), padded)
    assert expected.scalars["lm loss"] != references[("documents",)].scalars["lm loss"]
    for layout in PADDED:
        check(train(ranks, data, tmp_path / "-".join(layout), layout, padded), expected, layout)


OVERLAPPED = [
    layout
    for layout in LAYOUTS
    if "muon" in layout and {"distributed optimizer", "hybrid sharding"} & {*layout}
]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(x, id=" | ".join(x), marks=[pytest.mark.slow] * (number > 0))
        for number, x in enumerate(OVERLAPPED)
    ],
)
def test_a_layout_gives_the_same_answer_with_overlap(
    ranks: RankPools,
    data: Path,
    references: dict[Layout, Answer],
    tmp_path: Path,
    layout: Layout,
) -> None:
    """Buckets reduced under the backward pass, and gathered under the next forward pass."""
    got = train(ranks, data, tmp_path / "run", layout, OVERLAPS)
    check(got, references[kind_of(layout)], layout)


@pytest.mark.parametrize(
    "precision",
    [
        ("--bf16",),
        pytest.param(("--bf16", "--grad-reduce-in-bf16"), marks=pytest.mark.slow),
        pytest.param((), marks=pytest.mark.slow),
    ],
    ids=lambda flags: " ".join(flags) or "fp32",
)
@pytest.mark.parametrize(
    "layout",
    [
        ("DP 2", "distributed optimizer", "muon"),
        pytest.param(("EP 2", "DP 2", "distributed optimizer", "muon"), marks=pytest.mark.slow),
    ],
    ids=" | ".join,
)
def test_overlap_changes_no_bit(
    ranks: RankPools, data: Path, tmp_path: Path, layout: Layout, precision: tuple[str, ...]
) -> None:
    """A sum of two ranks has one order, and without clipping nothing else depends on buckets."""
    more = (*precision, "--clip-grad", "0")
    alone = train(ranks, data, tmp_path / "alone", layout, more)
    overlapped = train(ranks, data, tmp_path / "overlapped", layout, (*more, *OVERLAPS))
    losses = [{t: v for t, v in a.scalars.items() if t != "grad-norm"} for a in (alone, overlapped)]
    assert losses[0] == losses[1]
    assert alone.tensors.keys() == overlapped.tensors.keys()
    for key, tensor in alone.tensors.items():
        assert torch.equal(tensor, overlapped.tensors[key]), key


def check(got: Answer, expected: Answer, layout: Layout) -> None:
    """That a run gave the answer of another."""
    # Newton-Schulz stretches rounding errors where a gradient has no direction of its own, and
    # later gradients show it.
    gradients = 4e-5 if "muon" in layout else 1e-5
    for tag, values in expected.scalars.items():
        assert sorted(values) == list(range(1, STEPS + 1))
        assert got.scalars[tag][1] == pytest.approx(values[1], rel=1e-6), tag
        later = gradients if tag == "grad-norm" and "muon" in layout else 1e-6
        assert got.scalars[tag] == pytest.approx(values, rel=later), tag
    assert got.tensors.keys() == expected.tensors.keys()
    for key, tensor in got.tensors.items():
        difference = tensor - expected.tensors[key]
        if key.startswith("optimizer."):
            assert difference.norm() <= gradients * expected.tensors[key].norm(), key
        else:
            assert difference.abs().max() <= 1e-5, key


def test_documents_and_optimizers_are_told_apart(references: dict[Layout, Answer]) -> None:
    """The references differ, so that a layout that ignores a flag is found out."""
    losses = [tuple(answer.scalars["lm loss"].values()) for answer in references.values()]
    assert all(abs(a[-1] - b[-1]) > 1e-4 for a, b in combinations(losses, 2))


def test_the_table_is_possible() -> None:
    assert len(set(LAYOUTS)) == len(LAYOUTS)
    for layout in LAYOUTS:
        assert is_possible(layout), layout


def test_every_two_features_meet() -> None:
    met = {frozenset(pair) for layout in LAYOUTS for pair in combinations(layout, 2)}
    for one, other in combinations(AXES, 2):
        if can_meet(one, other):
            assert frozenset((one, other)) in met, (one, other)
