"""Sharing out work of different sizes, the same way on every rank."""

from __future__ import annotations

from collections.abc import Sequence


def assign(costs: Sequence[float], ranks: int, loads: Sequence[float] = ()) -> list[int]:
    """Give each item to a rank: the largest first, always to the rank with the least so far.

    The largest load is at most 4/3 - 1/(3 ranks) of the best possible one (Graham, 1969), and equal
    inputs give equal results, so ranks need not talk about it.

    Args:
        costs: of each item.
        ranks: how many there are.
        loads: what each rank has to do already; nothing by default.
    Returns: the rank of each item.
    """
    totals = list(loads) or [0.0] * ranks
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        owner = min(range(ranks), key=lambda rank: (totals[rank], rank))
        owners[item] = owner
        totals[owner] += costs[item]
    return owners
