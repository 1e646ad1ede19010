"""Weights travel from their owners in buckets, whatever their sizes and dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_trinity.optimizer.exchange import _buckets
from tests.distributed.pool import RankPools

SHAPES = [(3,), (2, 5), (40, 3), (1,), (7, 7)]


def spread(rank: int, world_size: int, bucket_bytes: int) -> list[list[Tensor]]:
    """Rank r fills its own tensors with r + 1, and starts with -1 elsewhere."""
    from megatron_trinity.optimizer.exchange import broadcast_from_owners

    tensors = [
        [
            torch.full(shape, float(owner + 1 if owner == rank else -1), dtype=dtype)
            for shape in SHAPES
            for dtype in (torch.float32, torch.bfloat16)
        ]
        for owner in range(world_size - 1)
    ]
    tensors.append([])  # the last rank owns nothing
    group = torch.distributed.new_group(list(range(world_size)))
    broadcast_from_owners(tensors, group, bucket_bytes)
    return tensors


@pytest.mark.parametrize("bucket_bytes", [1, 64, 10**6])
def test_every_rank_has_what_the_owners_had(ranks: RankPools, bucket_bytes: int) -> None:
    for of_rank in ranks.run(spread, bucket_bytes, world_size=3):
        for owner, tensors in enumerate(of_rank):
            assert all(torch.equal(t, torch.full_like(t, owner + 1)) for t in tensors)


def test_buckets_have_one_dtype_and_a_limit() -> None:
    tensors = [torch.zeros(n, dtype=d) for n in (2, 3, 9) for d in (torch.float32, torch.bfloat16)]
    buckets = list(_buckets(tensors, limit=20))
    assert [[(t.numel(), t.dtype) for t in bucket] for bucket in buckets] == [
        [(2, torch.bfloat16), (3, torch.bfloat16)],
        [(9, torch.bfloat16)],
        [(2, torch.float32), (3, torch.float32)],
        [(9, torch.float32)],
    ]
    assert list(_buckets([], limit=20)) == []
