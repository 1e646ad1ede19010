"""The document buffer's benchmark: its measure of how heavy the tails are."""

from __future__ import annotations

import random

import pytest

from benchmarks.rsdb import kurtosis


def test_kurtosis() -> None:
    assert kurtosis([0.0, 2.0]) == 1.0
    assert kurtosis([1.0] * 99 + [2.0]) == pytest.approx(98.0101, abs=1e-3)
    generator = random.Random(1)
    normal = [generator.gauss(5, 2) for _ in range(40_000)]
    assert kurtosis(normal) == pytest.approx(3, abs=0.1)
