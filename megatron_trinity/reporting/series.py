"""Curves for a picture: smoothed, thinned out with their extremes kept, cut into buckets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

Array = np.ndarray

SHOWN = 2000
"""Points that a curve keeps at most."""


def thinned(y: Array, limit: int = SHOWN) -> Array:
    """Indices of `y` that are kept, ascending; all if there are no more than `limit`.

    Of each bucket of neighbours its first and last point are kept, its least and its greatest, so
    that a picture no wider than the buckets shows what one of all points would.

    Args:
        y: `[N]`; what is not a number is as good as any other.
        limit: 8 or more.
    """
    if len(y) <= limit:
        return np.arange(len(y))
    edges = np.linspace(0, len(y), limit // 4 + 1).astype(int)
    finite = np.where(np.isfinite(y), y, np.nan_to_num(y, nan=0.0))
    kept = [
        (start, end - 1, start + finite[start:end].argmin(), start + finite[start:end].argmax())
        for start, end in pairwise(edges)
        if end > start
    ]
    return np.unique(np.array(kept))


def smoothed(y: Array, window: int) -> Array:
    """The mean of each point and those before it, `window` in all, of what is a number."""
    known = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    ends = np.arange(1, len(y) + 1)
    starts = np.maximum(ends - window, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[ends] - sums[starts]) / (counts[ends] - counts[starts])


def window_of(points: int) -> int:
    """Steps that a smoothed curve is a mean of."""
    return max(1, min(200, points // 50))


def buckets(points: int, limit: int) -> Array:
    """`[B + 1]` edges of at most `limit` buckets of as equal a size as can be."""
    return np.linspace(0, points, min(points, limit) + 1).astype(int)


def percentiles(y: Array, edges: Array, shares: Sequence[float]) -> Array:
    """`[len(shares), B]` percentiles of each bucket."""
    return np.array([np.percentile(y[a:b], shares) for a, b in pairwise(edges)]).T


def worst(rows: Array, edges: Array) -> Array:
    """`[L, B]` maxima of `[N, L]` by bucket."""
    return np.array([rows[a:b].max(axis=0) for a, b in pairwise(edges)]).T
