"""What the benchmark of the loss compares is one loss, computed in two ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.loss import Case, forward_and_backward, kinds, tensors
from tests.distributed.pool import RankPools

CASE = Case(tokens=40, hidden=16, vocab=50, chunk=12)


def both(rank: int, world_size: int) -> list[list[Tensor]]:
    given = tensors(CASE)
    return [forward_and_backward(loss, given) for loss in kinds(CASE).values()]


def test_both_sides_are_one_loss(ranks: RankPools) -> None:
    [(ours, peer)] = ranks.run(both, world_size=1)
    assert len(ours) == 3
    for mine, its in zip(ours, peer, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("chunk", "chunks"), [(12, 4), (40, 1), (100, 1)])
def test_a_case_says_how_many_chunks(chunk: int, chunks: int) -> None:
    assert Case(40, 16, 50, chunk).name == f"40 x 16 x 50, chunks: {chunks}"
