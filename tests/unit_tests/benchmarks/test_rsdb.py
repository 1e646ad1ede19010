"""The document buffer's benchmark: how heavy tails are, and how a loss moves."""

from __future__ import annotations

import random

import pytest

from benchmarks.rsdb import kurtosis, unrest


def test_kurtosis() -> None:
    assert kurtosis([0.0, 2.0]) == 1.0
    assert kurtosis([1.0] * 99 + [2.0]) == pytest.approx(98.0101, abs=1e-3)
    generator = random.Random(1)
    normal = [generator.gauss(5, 2) for _ in range(40_000)]
    assert kurtosis(normal) == pytest.approx(3, abs=0.1)


def test_unrest_is_of_changes_and_not_of_a_trend() -> None:
    assert unrest([5.0, 4.0, 3.0, 2.0]) == 0.0
    assert unrest([1.0, 2.0, 1.0, 2.0, 1.0]) == 1.0
