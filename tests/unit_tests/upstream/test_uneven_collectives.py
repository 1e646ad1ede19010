"""Unequal parts over gloo: gathered and summed as over NCCL."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.distributed.pool import RankPools

SIZES = [[3, 1, 2, 5], [0, 4, 0, 1], [2, 2, 2, 2]]


def part_of(rank: int, size: int) -> Tensor:
    return 100.0 * rank + torch.arange(2.0 * size).view(size, 2)


def gather_and_reduce(rank: int, world_size: int, sizes: list[int]) -> tuple[Tensor, Tensor]:
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    gathered = mappings._gather_along_first_dim(part_of(rank, sizes[rank]), dist.group.WORLD, sizes)
    whole = torch.arange(2.0 * sum(sizes)).view(-1, 2) * (rank + 1)
    reduced = mappings._reduce_scatter_along_first_dim(whole, dist.group.WORLD, sizes)
    return gathered, reduced


@pytest.mark.parametrize("sizes", SIZES)
def test_gather_and_reduce_scatter(ranks: RankPools, sizes: list[int]) -> None:
    everything = torch.cat([part_of(rank, size) for rank, size in enumerate(sizes)])
    total = torch.arange(2.0 * sum(sizes)).view(-1, 2) * (1 + 2 + 3 + 4)
    results = ranks.run(gather_and_reduce, sizes, world_size=4)
    for rank, (gathered, reduced) in enumerate(results):
        assert torch.equal(gathered, everything)
        assert torch.equal(reduced, total.split(sizes)[rank])
