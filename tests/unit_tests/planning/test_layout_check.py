"""What a check of a layout finds: each kind of fault, put into ranks that were right."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from megatron_trinity.model.boxes import Box, cover
from megatron_trinity.planning.fake_ranks import BuiltRank, build_rank, parse_layout
from megatron_trinity.planning.layout_check import LayoutCheck

FLAGS = ("--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2")
UNEQUAL = "FLOPs; at most 10% from the mean are balanced"


@pytest.fixture(scope="module")
def args() -> Namespace:
    # The LM head weighs about as much as a layer.
    layers = ("--num-layers", "5", "--num-dense-layers", "0", "--global-attn-every-n-layers", "1")
    layout = ("--pipeline-model-parallel-layout", "Et*3|t*2L")
    return parse_layout("tiny", 4, (*FLAGS, *layers, *layout))


@pytest.fixture(scope="module")
def ranks(args: Namespace) -> list[BuiltRank]:
    return [build_rank(args, rank) for rank in range(4)]


def problems(args: Namespace, ranks: list[BuiltRank]) -> list[str]:
    check = LayoutCheck(args)
    for rank in ranks:
        check.add(rank)
    return check.problems()


def test_nothing_is_wrong(args: Namespace, ranks: list[BuiltRank]) -> None:
    assert problems(args, ranks) == []


def test_stages_for_the_reader(args: Namespace, ranks: list[BuiltRank]) -> None:
    check = LayoutCheck(args)
    for rank in ranks:
        check.add(rank)
    first, last = check.stages()
    assert (first.holds, last.holds) == ("embedding, 1-3", "4-5, LM head")
    assert first.parameters == ranks[0].dense + ranks[0].expert
    dense, expert = ranks[0].dense, ranks[0].expert
    # Two ranks share what is not an expert's; an expert is on one rank of the stage. AdamW, with a
    # second moment, has the embedding and the gains of three layers.
    adamw = 192 * 2048 + 3 * (4 * 192 + 2 * 32)
    state = 6 * (dense + expert) + 8 * (dense // 2 + expert) + 4 * adamw // 2
    assert first.state_bytes == state
    # By hand: a layer's matrices, two products of 257/2 keys a token, and the LM head.
    layer = 192 * 32 * (3 * 6 + 2 * 2) + 192 * (8 + 3 * 3 * 128) + 257 * 6 * 32
    head = 192 * 2048
    mean = (5 * layer + head) / 2
    assert first.share == pytest.approx(3 * layer / mean)
    assert last.share == pytest.approx((2 * layer + head) / mean)


def fewer_parameters(ranks: list[BuiltRank]) -> list[BuiltRank]:
    return [replace(ranks[0], unique=ranks[0].unique - 1), *ranks[1:]]


def a_part_lost(ranks: list[BuiltRank]) -> list[BuiltRank]:
    key = "decoder.layers.0.mlp.router.weight"
    return [replace(r, boxes=tuple(b for b in r.boxes if b.key != key)) for r in ranks]


def an_expert_lost(ranks: list[BuiltRank]) -> list[BuiltRank]:
    key = "decoder.layers.4.mlp.experts.experts.linear_fc2.weight"
    boxes = tuple(box for box in ranks[2].boxes if box.key != key or box.start[0] != 1)
    assert len(boxes) == len(ranks[2].boxes) - 1
    return [*ranks[:2], replace(ranks[2], boxes=boxes), ranks[3]]


def a_layer_twice(ranks: list[BuiltRank]) -> list[BuiltRank]:
    chunk = ranks[0].chunks[0]
    chunk = replace(chunk, layers=(*chunk.layers[:2], chunk.layers[1]))
    return [replace(rank, chunks=(chunk,)) for rank in ranks[:2]] + ranks[2:]


def another_kind_of_layer(ranks: list[BuiltRank]) -> list[BuiltRank]:
    chunk = ranks[0].chunks[0]
    number, kind = chunk.layers[2]
    chunk = replace(chunk, layers=(*chunk.layers[:2], (number, replace(kind, is_global=False))))
    return [replace(rank, chunks=(chunk,)) for rank in ranks[:2]] + ranks[2:]


def no_head(ranks: list[BuiltRank]) -> list[BuiltRank]:
    chunk = replace(ranks[2].chunks[0], has_lm_head=False)
    return ranks[:2] + [replace(rank, chunks=(chunk,)) for rank in ranks[2:]]


def two_embeddings(ranks: list[BuiltRank]) -> list[BuiltRank]:
    chunk = replace(ranks[2].chunks[0], has_embedding=True)
    return ranks[:2] + [replace(rank, chunks=(chunk,)) for rank in ranks[2:]]


def ranks_that_differ(ranks: list[BuiltRank]) -> list[BuiltRank]:
    return [ranks[0], replace(ranks[1], chunks=ranks[2].chunks), *ranks[2:]]


def a_stage_missing(ranks: list[BuiltRank]) -> list[BuiltRank]:
    return ranks[:2]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (fewer_parameters, "the ranks hold 4,792,063.0 parameters, the model has 4,792,064"),
        (a_part_lost, "the tensors have 4,790,528 parameters, not 4,792,064"),
        (an_expert_lost, "linear_fc2.weight: some values are on 0 ranks, others on 1"),
        (a_layer_twice, "the stages do not hold layers 1 to 5 in order"),
        (another_kind_of_layer, "the stages do not hold layers 1 to 5 in order"),
        (no_head, "the LM head is not on the last stage alone"),
        (two_embeddings, "the embedding is not on the first stage alone"),
        (ranks_that_differ, "stage 0: ranks 0 and 1 differ in layers"),
        (a_stage_missing, "stage 1 has no rank"),
    ],
)
def test_faults_are_found(
    args: Namespace,
    ranks: list[BuiltRank],
    fault: Callable[[list[BuiltRank]], list[BuiltRank]],
    says: str,
) -> None:
    found = problems(args, fault(ranks))
    assert any(says in problem for problem in found), found
    assert all("\n" not in problem for problem in found)


def test_stages_out_of_balance_are_found() -> None:
    flags = ("--pipeline-model-parallel-size", "4", "--expert-model-parallel-size", "32")
    args = parse_layout("large", 128, flags)
    found = problems(args, [build_rank(args, rank) for rank in (0, 32, 64, 96)])
    # 15 layers each: the LM head is too much for the last.
    assert found == [f"stage 3 has 1.134 of the mean stage's {UNEQUAL}"]


def test_cover_counts_cells() -> None:
    generator = np.random.default_rng(4)
    shape = (3, 5, 4)
    for _ in range(50):
        boxes: Counter[Box] = Counter()
        plain = np.zeros(shape, dtype=int)
        for _ in range(int(generator.integers(1, 5))):
            start = tuple(int(generator.integers(0, size)) for size in shape)
            stop = tuple(
                int(generator.integers(a + 1, size + 1))
                for a, size in zip(start, shape, strict=True)
            )
            count = int(generator.integers(1, 4))
            boxes[Box("w", start, stop, shape)] += count
            plain[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] += count
        assert cover(boxes) == {"w": (plain.min(), plain.max())}
