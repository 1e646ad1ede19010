"""The arithmetic of the benchmark of what watching costs."""

from __future__ import annotations

import pytest

from benchmarks.watching_cost import WARM_UP, Cost, Step, is_watched

PARTS = {
    "step_ended": 0.010,
    "balancing": 0.004,
    "micro-batches": 0.001,
    "TensorBoard": 0.002,
    "log": 0.003,
    "events": 0.0005,
}


def test_each_pair_has_one_watched_step_and_the_order_turns_around() -> None:
    pairs = [(is_watched(step), is_watched(step + 1)) for step in range(2, 10, 2)]
    assert pairs == [(False, True), (True, False)] * 2


def test_a_drift_of_the_machine_cancels() -> None:
    numbers = range(2, 2 + 2 * (WARM_UP + 20))
    steps = [
        Step(
            watched=is_watched(number),
            wall=1 + 0.1 * number + 0.05 * is_watched(number),
            cpu=1 + 0.02 * is_watched(number),
            parts=PARTS if is_watched(number) else {},
        )
        for number in numbers
    ]
    cost = Cost.of(steps)
    assert cost.wall.difference == pytest.approx(0.05)
    assert cost.cpu.difference == pytest.approx(0.02)
    assert cost.cpu.error == pytest.approx(0, abs=1e-12)
    assert cost.alone["load metrics and alarms"] == pytest.approx(0.003)
    assert sum(cost.alone.values()) == pytest.approx(0.009)
