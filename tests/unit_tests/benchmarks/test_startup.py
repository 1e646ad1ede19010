"""The arithmetic of the benchmarks of starting, of recovering and of measuring ranks."""

from __future__ import annotations

import os

from benchmarks import recovery, slow_ranks, startup


def test_parts_of_a_start() -> None:
    marks = [(110.0 + n, 0.5 * (n + 1)) for n in range(len(startup.PARTS))]
    clock, cpu = startup.parts(100.0, marks)
    assert clock == [10.0, *[1.0] * (len(startup.PARTS) - 1)]
    assert cpu == [0.5] * len(startup.PARTS)
    assert startup.medians([[1.0, 2.0], [5.0, 0.0], [3.0, 9.0]]) == [3.0, 2.0, 5.0]


def test_each_pair_has_one_measured_step_and_the_order_turns_around() -> None:
    pairs = [(slow_ranks.is_measured(step), slow_ranks.is_measured(step + 1)) for step in (1, 3, 5)]
    assert pairs == [(True, False), (False, True), (True, False)]


def test_a_process_that_has_been_waited_for_runs_no_more() -> None:
    assert recovery.is_running(os.getpid())
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert not recovery.is_running(child)
