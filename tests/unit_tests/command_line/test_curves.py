"""Smooth lines of curves."""

from __future__ import annotations

from megatron_trinity.command_line.curves import SMOOTHING, points, running_mean


def test_a_running_mean_is_of_the_steps_up_to_it() -> None:
    curve = {step: float(step) for step in range(1, 41)}
    means = running_mean(curve)
    assert list(means) == list(range(SMOOTHING, 41))
    assert means[10] == sum(range(1, 11)) / 10
    assert means[40] == sum(range(31, 41)) / 10


def test_a_short_run_is_a_line_too() -> None:
    assert running_mean({3: 1.0, 4: 3.0, 5: 5.0, 6: 1.0}) == {4: 2.0, 5: 4.0, 6: 3.0}
    assert points(running_mean({7: 2.0})) == ([7], [2.0])
