"""Which source each sample comes from, by the number of the sample alone.

Sample m draws the source in whose share of [0, 1) the m-th point of the van der Corput sequence
lies: the bits of m in reverse, behind the point. How often a source was drawn before m follows from
the bits of m, so that nothing has to be counted from the start. After n samples a source with a
share of w has given w * n of them, give or take 2 + log2(n). Within a block of samples the draws
are then shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_trinity.data.permutation import shuffled

BLOCK_BITS = 12
BLOCK = 1 << BLOCK_BITS
"""Samples that are shuffled together."""

_BITS = 62
SMALLEST_SHARE = 2.0**-60
"""A source of a smaller share might never be drawn."""

Counts = NDArray[np.int64]


class Blend:
    """A sequence of (source, number of the sample within the source)."""

    def __init__(self, weights: Sequence[float], length: int | None, *key: object) -> None:
        """Args:
        weights: of each source, finite and above 0.
        length: samples after which it ends, or None for no end.
        key: decides the order within blocks.
        """
        self._sources, self._length, self._key = len(weights), length, key
        self._bounds = _bounds(weights)
        self._block = lru_cache(maxsize=2)(self._make_block)

    def __getitem__(self, sample: int) -> tuple[int, int]:
        """Source of `sample`, and how many of that source there are before it."""
        if self._sources == 1:
            return 0, sample
        sources, indices = self._block(sample >> BLOCK_BITS)
        place = sample & (BLOCK - 1)
        return int(sources[place]), int(indices[place])

    def given(self, samples: int) -> Counts:
        """How many each source gives among the first `samples`, `[sources]`."""
        block, within = divmod(samples, BLOCK)
        if within == 0 or samples == self._length or self._sources == 1:
            return self._drawn(samples)
        sources, _ = self._block(block)
        part = np.bincount(sources[:within], minlength=self._sources)
        return self._drawn(block * BLOCK) + part

    def _drawn(self, points: int) -> Counts:
        """How many of the first `points` of the sequence are in each share."""
        below = np.zeros(self._sources + 1, dtype=np.int64)
        for bit in range(points.bit_length()):
            if points >> bit & 1:
                # 2**bit points, evenly spaced, from the reverse of their common upper bits on.
                first = _reverse(points >> (bit + 1) << (bit + 1))
                step = 1 << (_BITS - bit)
                below += np.clip((self._bounds - first + (step - 1)) // step, 0, 1 << bit)
        return np.diff(below)

    def _make_block(self, block: int) -> tuple[NDArray[np.int64], Counts]:
        begin = block * BLOCK
        size = BLOCK if self._length is None else min(BLOCK, self._length - begin)
        points = _REVERSED + _reverse(begin)
        sources = self._bounds[1:].searchsorted(points, side="right")[:size]
        by_source = np.argsort(sources, kind="stable")
        counts = np.bincount(sources, minlength=self._sources)
        ranks = np.empty(size, dtype=np.int64)
        ranks[by_source] = np.arange(size) - np.repeat(np.cumsum(counts) - counts, counts)
        indices = self._drawn(begin)[sources] + ranks
        order = shuffled(size, "blend", *self._key, block)
        return sources[order], indices[order]


def _reverse(number: int) -> int:
    """The lowest 62 bits in reverse."""
    return int(f"{number:0{_BITS}b}"[::-1], 2)


_REVERSED = np.array([_reverse(number) for number in range(BLOCK)], dtype=np.int64)


def _bounds(weights: Sequence[float]) -> Counts:
    """Where the shares begin and end, in units of 2**-62, `[sources + 1]`; without rounding."""
    whole = [int(Fraction(weight) * 2**200) for weight in weights]
    total, running, bounds = sum(whole), 0, [0]
    for part in whole:
        running += part
        bounds.append((running << _BITS) // total)
    return np.array(bounds, dtype=np.int64)
