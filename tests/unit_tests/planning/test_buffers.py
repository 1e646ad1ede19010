"""At every recommended layout next to nothing of the buffers is padding."""

from __future__ import annotations

import pytest

from megatron_trinity.planning.layouts import Layout, recommended
from tests.crosses import first
from tests.distributed.pool import RankPools

CASES = [("large", 2048), ("nano", 512), ("mini", 64), ("nano", 16), ("mini", 512), ("large", 512)]
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")


def padding(rank: int, world_size: int, layout: Layout, flags: tuple[str, ...]) -> list[float]:
    """Of a rank of the first and of the last stage."""
    import torch.distributed as dist

    from megatron_trinity.planning.buffers import buffers_of_rank
    from megatron_trinity.planning.fake_ranks import build_chunks, fake_groups, parse_layout

    dist.destroy_process_group()
    args = parse_layout(layout.preset, layout.world_size, (*layout.flags, *flags))
    shares = []
    for built in {0, layout.world_size - 1}:
        with fake_groups(args, built) as groups:
            shares.append(buffers_of_rank(args, build_chunks(args, groups), groups).padding)
    return shares


@pytest.mark.parametrize(("preset", "world_size"), first(1, CASES))
def test_padding_is_less_than_three_percent(preset: str, world_size: int, ranks: RankPools) -> None:
    for flags in ((), OVERLAP):
        [shares] = ranks.run(padding, recommended(preset, world_size), flags, world_size=1)
        assert all(0 <= share < 0.03 for share in shares)
