"""Shares of work: small cases by hand, and the bound of the greedy rule."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from megatron_trinity.optimizer.assignment import assign


def loads(costs: list[float], owners: list[int], ranks: int) -> list[float]:
    return [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(ranks)]


def test_the_largest_goes_first_to_the_least_loaded() -> None:
    assert assign([1, 5, 3, 3], 2) == [0, 0, 1, 1]
    assert assign([4, 4, 4], 2) == [0, 1, 0]


def test_what_a_rank_has_to_do_already_counts() -> None:
    assert assign([2, 2, 2], 2, loads=[10, 0]) == [1, 1, 1]
    assert sorted(assign([2, 2, 2], 2, loads=[2, 0])) == [0, 1, 1]


def test_more_ranks_than_items_and_none() -> None:
    assert assign([1, 1], 4) == [0, 1]
    assert assign([], 3) == []


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=7),
    st.integers(1, 3),
)
def test_at_most_a_third_above_the_best(costs: list[int], ranks: int) -> None:
    best = min(
        max(loads(list(costs), list(owners), ranks))
        for owners in product(range(ranks), repeat=len(costs))
    )
    got = max(loads(list(costs), assign(costs, ranks), ranks))
    assert best <= got <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9
