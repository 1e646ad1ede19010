"""Alarms on made-up runs: noise, climbs, jumps, falls and values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_trinity.training.alarm import MIN_RATIO, MIN_RISE, Alarms, ClimbAlarm

WINDOW = 100


def warnings(
    values: Iterable[float], window: int = WINDOW, name: str = "value"
) -> list[tuple[int, str]]:
    """Iterations, counted from 1, and the warnings that an alarm gave there."""
    alarm = ClimbAlarm(window, name)
    lines = ((i, alarm.update(i, float(value))) for i, value in enumerate(values, start=1))
    return [(iteration, line) for iteration, line in lines if line is not None]


def noise(steps: int, seed: int, scale: float = 0.1) -> np.ndarray:
    """Factors around 1, as a violation scatters."""
    return np.exp(scale * np.random.default_rng(seed).normal(size=steps))


@pytest.mark.parametrize("window", [20, 100, 400])
@pytest.mark.parametrize("scale", [0.1, 0.3, 1.0])
def test_steady_noise(window: int, scale: float) -> None:
    for seed in range(5):
        assert warnings(0.5 * noise(2000, seed, scale), window) == []


def test_a_constant_and_a_fall() -> None:
    assert warnings([2.0] * 500) == []
    assert warnings(np.linspace(9.0, 1.0, 500)) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_slow_climb_warns_once(seed: int) -> None:
    """Steady for 300 steps, then twelvefold over 1200 and steady again."""
    climb = np.concatenate([np.full(300, 0.5), np.linspace(0.5, 6.0, 1200), np.full(500, 6.0)])
    ((iteration, line),) = warnings(climb * noise(2000, seed), name="max violation, layer 7")
    assert 320 < iteration < 600
    assert line.startswith("max violation, layer 7 keeps climbing: mean ")
    assert line.endswith("(window of 100 steps)")


def test_growth_by_a_factor_a_step() -> None:
    """A hundredfold within the window."""
    assert len(warnings(0.1 * 100 ** (np.arange(200) / 100) * noise(200, seed=1))) == 1


def test_a_slower_climb_than_the_ratio_is_not_told() -> None:
    assert warnings(1.0 + np.arange(2000) / 400) == []
    assert len(warnings(1.0 + np.arange(2000) / 400, window=400)) == 1


@pytest.mark.parametrize("seed", range(10))
def test_a_jump_is_not_a_climb(seed: int) -> None:
    jump = np.where(np.arange(600) < 300, 0.5, 5.0)
    assert warnings(jump) == []
    assert warnings(jump * noise(600, seed)) == []


@pytest.mark.parametrize("seed", range(5))
def test_one_wild_step_is_not_a_climb(seed: int) -> None:
    spikes = noise(1000, seed)
    spikes[500] = 50.0
    assert warnings(spikes) == []


def test_a_tiny_value_may_grow() -> None:
    assert warnings(np.linspace(0.0, MIN_RISE, 100)) == []
    assert len(warnings(np.linspace(0.0, 2 * MIN_RISE, 100))) == 1


def test_a_negative_value_may_climb() -> None:
    assert len(warnings(np.linspace(-5.0, -1.0, 100))) == 1


def test_the_line_tells_then_and_now() -> None:
    ((iteration, line),) = warnings(range(20), window=20, name="max logit")
    assert iteration == 20
    assert line == (
        "max logit keeps climbing: mean 2 in iterations 1 to 5, 17 in 16 to 20 (window of 20 steps)"
    )


def test_fall_and_climb_again() -> None:
    up, down = np.linspace(1.0, 5.0, 300), np.linspace(5.0, 1.0, 300)
    again = [iteration for iteration, _ in warnings(np.concatenate([up, down, up, down]))]
    assert len(again) == 2
    assert again[0] <= 300
    assert 600 < again[1] <= 900


def test_a_small_fall_does_not_arm_again() -> None:
    """From 1 to 5, back to 3.5 and up to 10: less than half of the gain was lost."""
    values = np.concatenate(
        [np.linspace(1.0, 5.0, 300), np.linspace(5.0, 3.5, 100), np.linspace(3.5, 10.0, 300)]
    )
    assert len(warnings(values)) == 1


def test_a_fall_is_measured_from_the_highest() -> None:
    """From 1 to 9 and back to 4, which is above where the first warning came, and up again."""
    values = np.concatenate(
        [np.linspace(1.0, 9.0, 400), np.linspace(9.0, 4.0, 200), np.linspace(4.0, 20.0, 400)]
    )
    first, second = (iteration for iteration, _ in warnings(values))
    assert first <= 400
    assert second > 600


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_warns_at_once(value: float) -> None:
    assert warnings([1.0, value, value, 1.0, value], name="max logit") == [
        (2, f"max logit is {value} at iteration 2")
    ]


def test_not_finite_warns_again_after_a_full_window() -> None:
    values = [math.nan, *[1.0] * 20, math.nan, *[1.0] * 19, math.nan]
    assert [iteration for iteration, _ in warnings(values, window=20)] == [1, 22]


def test_not_finite_empties_the_window() -> None:
    values = [*range(15), math.nan, *range(15, 34)]
    assert [iteration for iteration, _ in warnings(values, window=20)] == [16]
    assert [iteration for iteration, _ in warnings([*values, 34], window=20)] == [16, 36]


@given(st.lists(st.floats(-1.0, 2.0), min_size=20, max_size=80))
def test_a_warning_is_a_climb(steps: list[float]) -> None:
    values = np.cumsum(steps)
    for iteration, _ in warnings(values, window=20):
        quarters = np.reshape(values[iteration - 20 : iteration], (4, 5)).mean(axis=1)
        assert (np.diff(quarters) > 0).all()
        assert quarters[3] >= MIN_RATIO * quarters[0]
        assert quarters[3] - quarters[0] >= MIN_RISE


@pytest.mark.parametrize("window", [-4, 0, 16, 21, 102])
def test_windows_that_do_not_work(window: int) -> None:
    for alarm in (ClimbAlarm, Alarms):
        with pytest.raises(ValueError, match=f"multiple of 4 and at least 20 steps, not {window}"):
            alarm(window)


def test_alarms_are_told_apart_by_name() -> None:
    alarms = Alarms(20)
    lines: dict[int, list[str]] = {}
    for i in range(1, 61):
        values = {"max violation, layer 3": 1.0, "max violation, layer 4": float(i)}
        if i % 2:  # every other step: its window fills at the 39th
            values["max logit"] = float(i)
        lines[i] = alarms.update(i, values)
    told = {i: [line.partition(" keeps ")[0] for line in found] for i, found in lines.items()}
    assert {i: names for i, names in told.items() if names} == {
        20: ["max violation, layer 4"],
        39: ["max logit"],
    }
    assert alarms.update(61, {"max violation, layer 3": math.nan, "max logit": math.inf}) == [
        "max violation, layer 3 is nan at iteration 61",
        "max logit is inf at iteration 61",
    ]
