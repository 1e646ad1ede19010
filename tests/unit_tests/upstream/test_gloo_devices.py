"""Process groups of one rank share a thread of gloo, and reduce as those that do not."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_trinity.upstream.cpu.gloo_devices import _devices
from tests.distributed.pool import RankPools

GROUPS = 5


def loops() -> int:
    """Threads of gloo's devices in this process."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("gloo_tcp_loop")


def reduce_in_many(rank: int, world_size: int) -> tuple[int, list[list[float]]]:
    """Sums over overlapping groups, all in flight at once."""
    groups = [dist.new_group() for _ in range(GROUPS)]
    values = [torch.full((1000,), float(10 * number + rank)) for number in range(GROUPS)]
    works = [
        dist.all_reduce(value, group=group, async_op=True)
        for value, group in zip(values, groups, strict=True)
    ]
    for work in reversed(works):
        work.wait()
    return loops(), [value.unique().tolist() for value in values]


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_thread_serves_all_groups(ranks: RankPools, world_size: int) -> None:
    of_ranks = sum(range(world_size))
    sums = [[10.0 * number * world_size + of_ranks] for number in range(GROUPS)]
    assert ranks.run(reduce_in_many, world_size=world_size) == [(1, sums)] * world_size


def timeouts_of_groups(rank: int, world_size: int) -> tuple[timedelta, timedelta, int]:
    """Of a group with a timeout, and of one that is made with options; with its threads."""
    chosen = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    chosen._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
    chosen._timeout = timedelta(seconds=78)
    store = dist.PrefixStore("own", dist.distributed_c10d._get_default_store())
    own = dist.ProcessGroupGloo(store, rank, world_size, chosen)
    backend = dist.new_group(timeout=timedelta(seconds=77))._get_backend(torch.device("cpu"))
    return backend.options._timeout, own.options._timeout, loops()


def test_timeouts_and_options_are_kept(ranks: RankPools) -> None:
    expected = (timedelta(seconds=77), timedelta(seconds=78), 2)
    assert ranks.run(timeouts_of_groups, world_size=2) == [expected] * 2


def test_a_device_for_each_interface_that_is_named() -> None:
    assert len(_devices("lo")) == 1
    assert len(_devices("lo,lo")) == 2
    assert len(_devices("")) == 1
    assert _devices("lo") == _devices("lo")
    _devices.cache_clear()  # or their threads stay in this process
