"""Sampling by length: the report's ends, and as many documents as the probability says."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_trinity.data.length_bias import LengthBias


def test_from_one_per_cent_to_ninety() -> None:
    lengths = np.array([0, 1, 1456, 1457, 13_107, 65_536, 131_072, 1_000_000])
    expected = [0.01, 0.01, 0.01, 0.010004, 0.09, 0.45, 0.9, 0.9]
    assert LengthBias().probability(lengths) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("length", [100, 30_000, 200_000])
def test_takes_as_many_as_it_says(length: int) -> None:
    lengths = np.full(40_000, length, dtype=np.int32)
    taken = LengthBias().taken(lengths, seed=1)
    assert set(np.unique(taken)) <= {0, length}
    likely = float(LengthBias().probability(lengths[:1])[0])
    spread = (likely * (1 - likely) / 40_000) ** 0.5
    assert abs(np.count_nonzero(taken) / 40_000 - likely) < 4 * spread


def test_seed_and_number_decide() -> None:
    lengths = np.full(1000, 60_000, dtype=np.int32)
    one, other = (LengthBias().taken(lengths, seed) for seed in (1, 2))
    assert (LengthBias().taken(lengths, 1) == one).all()
    assert (one != other).any()
    longer = LengthBias().taken(np.append(lengths, np.int32(60_000)), 1)
    assert (longer[:1000] == one).all()
