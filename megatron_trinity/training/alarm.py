"""Warnings for values that keep climbing: the way in which an unbalanced run announces itself.

An alarm lives in memory only: after a resume it starts with an empty window.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import numpy as np

QUARTERS = 4
MIN_WINDOW = 20  # five values a quarter, fewer say little about their own noise

MIN_RATIO = 1.5  # newest quarter to oldest
MIN_RISE = 0.1  # the same as a difference: a tiny value may double unnoticed
STANDARD_ERRORS = 3.0  # of each difference between quarters


class ClimbAlarm:
    """Watches one value, and says once that it climbs.

    The newest `window` values are cut into quarters. The value climbs if the mean of each quarter
    is above that of the one before by `STANDARD_ERRORS` standard errors of the difference (Welch's,
    from the scatter within the two quarters), and the last mean is at least `MIN_RATIO` times the
    first and `MIN_RISE` above it. Noise does not pass, nor does a single jump, however high: it
    leaves at least two quarters alike.

    After a warning, the next one needs a fall first: the mean of the newest quarter has to lose
    half of what the highest such mean since had gained over the start of the climb.

    A value that is not finite gives a warning at once and empties the window; the next such warning
    needs a full window of finite values first.
    """

    def __init__(self, window: int, name: str = "value") -> None:
        """Watch the last `window` values of what the warnings call `name`.

        Raises: ValueError unless `window` is a multiple of 4 and at least 20.
        """
        if window < MIN_WINDOW or window % QUARTERS:
            raise ValueError(
                f"an alarm's window has to be a multiple of {QUARTERS} and at least {MIN_WINDOW} "
                f"steps, not {window}"
            )
        self._window = window
        self._name = name
        self._values: deque[float] = deque(maxlen=window)
        self._iterations: deque[int] = deque(maxlen=window)
        self._start: float | None = None  # first mean of the climb that was told of, until it falls
        self._peak = -math.inf  # highest mean of a quarter since
        self._told_not_finite = False

    def update(self, iteration: int, value: float) -> str | None:
        """Take in the value of a step; returns a line to print, without a newline, if it is due."""
        if not math.isfinite(value):
            self._values.clear()
            self._iterations.clear()
            told, self._told_not_finite = self._told_not_finite, True
            return None if told else f"{self._name} is {value} at iteration {iteration}"
        self._values.append(value)
        self._iterations.append(iteration)
        if len(self._values) < self._window:
            return None
        self._told_not_finite = False

        quarters = np.array(self._values, dtype=np.float64).reshape(QUARTERS, -1)
        first, *_, last = quarters.mean(axis=1).tolist()
        if self._start is not None:
            self._peak = max(self._peak, last)
            if last <= (self._start + self._peak) / 2:
                self._start = None
            return None
        if not _climbs(quarters):
            return None
        self._start, self._peak = first, last
        size = quarters.shape[1]
        oldest, newest = self._iterations[0], self._iterations[-1]
        return (
            f"{self._name} keeps climbing: mean {first:.4g} in iterations {oldest} to "
            f"{self._iterations[size - 1]}, {last:.4g} in {self._iterations[-size]} to {newest} "
            f"(window of {self._window} steps)"
        )


class Alarms:
    """A `ClimbAlarm` for each name that it is given, such as "max violation, layer 7"."""

    def __init__(self, window: int) -> None:
        """Raises: ValueError as `ClimbAlarm` does, at once."""
        ClimbAlarm(window)
        self._window = window
        self._alarms: dict[str, ClimbAlarm] = {}

    def update(self, iteration: int, values: Mapping[str, float]) -> list[str]:
        """Take in a step's values by name; returns the lines that are due, in their order.

        A name may be missing from a step: its window waits.
        """
        lines = []
        for name, value in values.items():
            if name not in self._alarms:
                self._alarms[name] = ClimbAlarm(self._window, name)
            line = self._alarms[name].update(iteration, value)
            if line is not None:
                lines.append(line)
        return lines


def _climbs(quarters: np.ndarray) -> bool:
    """Whether values `[4, window / 4]` climb from quarter to quarter, noise allowed for."""
    means = quarters.mean(axis=1)
    variances = quarters.var(axis=1, ddof=1) / quarters.shape[1]  # of the means
    rises = np.diff(means)
    standard_errors = np.sqrt(variances[:-1] + variances[1:])
    return bool(
        (rises > 0).all()
        and (rises >= STANDARD_ERRORS * standard_errors).all()
        and means[-1] >= MIN_RATIO * means[0]
        and means[-1] - means[0] >= MIN_RISE
    )
