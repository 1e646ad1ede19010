"""Own times by a clock that moves only where the test says so, and how ranks compare."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from tests.distributed.pool import RankPools


class ClockByHand:
    """Seconds pass where somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def passes(self, seconds: float) -> None:
        self.now += seconds


def own_times(rank: int, world_size: int) -> list[object]:
    """A step of known seconds, one that is left, one with no end; and what is timed between."""
    import torch
    import torch.distributed as dist

    from megatron_trinity.training import own_time

    clock = ClockByHand()
    own = own_time.OwnTime(clock)
    before = dist.Work.wait

    def waits(seconds: float) -> None:
        """In a collective that takes so long."""
        work = dist.all_reduce(torch.ones(1), async_op=True)
        # A wait that takes time: of two things that are timed, the one behind the other.
        with mock.patch.object(own._clock, "mark", side_effect=[clock.now, clock.now + seconds]):
            work.wait()
        clock.passes(seconds)

    def samples() -> Iterator[int]:
        for number in range(2):
            ticks.passes(0.25)
            yield number

    ticks = ClockByHand()
    found: list[object] = [own.read()]
    own.begins()
    clock.passes(3.0)
    waits(2.0)
    with mock.patch.object(own_time.time, "perf_counter", side_effect=ticks.mark):
        reader = own.reading(samples())
        assert reader is not None
        assert list(reader) == [0, 1]
    clock.passes(1.0)
    own.part_ends()
    clock.passes(0.5)
    waits(8.0)
    own.part_ends()
    waits_of_a_step = own.read()
    found.append(waits_of_a_step)
    found.append(before is dist.Work.wait)
    own.begins()
    found.append(before is dist.Work.wait)
    own.forget()
    found.append((own.read(), before is dist.Work.wait))
    with own.until_the_end():
        own.begins()
    iterator: Any = iter([1])
    found.append((before is dist.Work.wait, own.reading(iterator) is iterator, own.reading(None)))
    return found


def test_waits_are_not_a_ranks_own(ranks: RankPools) -> None:
    [found] = ranks.run(own_times, world_size=1)
    assert found == [None, [4.0, 0.5, 0.5], True, False, (None, True), (True, True, None)]


def every_wait(rank: int, world_size: int) -> dict[str, int]:
    """How often each collective is timed."""
    import torch
    import torch.distributed as dist

    from megatron_trinity.training.own_time import OwnTime

    one, two = torch.ones(1), torch.ones(2)
    calls = {
        "all_reduce": lambda: dist.all_reduce(one),
        "broadcast": lambda: dist.broadcast(one, 0),
        "all_gather": lambda: dist.all_gather([one, one.clone()], one.clone()),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(two, one),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(one, two),
        "all_to_all_single": lambda: dist.all_to_all_single(two, two.clone()),
        "barrier": dist.barrier,
        "send and recv": lambda: dist.send(one, 1) if rank == 0 else dist.recv(one, 0),
        "batch_isend_irecv": lambda: [
            work.wait()
            for work in dist.batch_isend_irecv(
                [dist.P2POp(dist.isend if rank == 0 else dist.irecv, one, 1 - rank)]
            )
        ],
        "asynchronous": lambda: dist.all_reduce(one, async_op=True).wait(),
    }
    own = OwnTime()
    found = {}
    for name, call in calls.items():
        own.begins()
        call()
        found[name] = len(own._waits)
        own.forget()
    return found


def test_whatever_waits_is_timed(ranks: RankPools) -> None:
    for found in ranks.run(every_wait, world_size=2):
        # The call, and the wait for what it has started.
        assert found == dict.fromkeys(found, 2)
        assert len(found) == 10


def test_a_rank_is_compared_with_those_of_its_stage() -> None:
    from megatron_trinity.training.slow_ranks import RankTimes, event, ranks_line, scalars

    seconds = [[1.0, 0.5, 0.0], [2.5, 0.5, 0.0], [6.0, 2.0, 0.1], [6.0, 2.4, 0.3]]
    times = RankTimes(200, seconds, (0, 0, 1, 1), ("a", "b", "c", "d"))
    assert times.own == [1.5, 3.0, 8.0, 8.4]
    assert times.ratios == [1.0, 2.0, 1.0, pytest.approx(1.05)]
    assert times.slowest == 1
    assert times.parts(1) == {"forward-backward": 2.5, "optimizer": 1.0, "data": 1.0}
    assert times.parts(3)["data"] == pytest.approx(3.0)
    assert ranks_line(times) == (
        " ranks          200 | slowest: rank 1 on b | its own time (ms): 3000.0 | to the median: "
        "2.00 | forward-backward: 2.50 | optimizer: 1.00 | data: 1.00 |"
    )
    assert scalars(times) == {
        "slowest rank": 1.0,
        "slowest rank, time to the median": 2.0,
        "own time of a step, median (ms)": 5500.0,
    }
    told = event(times)
    assert told["slowest"] == 1
    assert told["host"] == "b"
    assert told["seconds"] == times.own


def measured(rank: int, world_size: int, interval: int) -> list[int]:
    """Which of twelve steps are measured."""
    from megatron_trinity.training.slow_ranks import SlowRanks

    slow = SlowRanks(Namespace(straggler_interval=interval))
    found = []
    for iteration in range(1, 13):
        slow.step_begins(iteration)
        if slow.own._marks:
            found.append(iteration)
        slow.own.forget()
    return found


def test_the_last_steps_of_an_interval_are_measured(ranks: RankPools) -> None:
    assert ranks.run(measured, 12, world_size=1)[0] == [8, 9, 10, 11, 12]
    assert ranks.run(measured, 2, world_size=1)[0] == list(range(1, 13))
    assert ranks.run(measured, 0, world_size=1)[0] == []
