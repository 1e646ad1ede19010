"""Parameters in buckets: none overlap, little is padding, and cuts are between rows."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

from megatron_trinity.optimizer.layout import ALIGNMENT, Item, buckets, place, rows_in_shards

EXPERTS = [Item(512 * 1024, 1024), Item(1024 * 256, 256)] * 48
FEW = [Item(8192 * 3072, 3072), Item(3072 * 6144, 6144), Item(256 * 3072, 3072)] * 4


def some_items(seed: int) -> list[Item]:
    generator = random.Random(seed)
    widths = [generator.choice((1, 48, 64, 192, 256)) for _ in range(generator.randint(1, 30))]
    return [Item(width * generator.randint(1, 2000), width) for width in widths]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_items_lie_beside_each_other(seed: int, ranks: int) -> None:
    items = some_items(seed)
    bucket = place(items, ranks)
    taken = sorted((start, start + i.numel) for start, i in zip(bucket.starts, items, strict=True))
    assert all(end <= following for (_, end), (following, _) in pairwise(taken))
    assert taken[0][0] >= 0
    assert taken[-1][1] <= ranks * bucket.shard
    assert all(start % ALIGNMENT == 0 for start in (*bucket.starts, bucket.shard))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_in_one_shard_and_whole(seed: int, ranks: int) -> None:
    items = some_items(seed)
    bucket = place(items, ranks)
    for start, item in zip(bucket.starts, items, strict=True):
        rows: Counter[int] = Counter()
        for rank, (first, last) in rows_in_shards(start, item, bucket.shard):
            rows.update(range(first, last))
            assert rank * bucket.shard <= start + first * item.width
            assert start + last * item.width <= (rank + 1) * bucket.shard
        assert rows == Counter(range(item.numel // item.width))


def test_matrices_that_can_be_dealt_out_are_whole() -> None:
    bucket = place(EXPERTS, 8)
    assert bucket.shard * 8 == sum(item.numel for item in EXPERTS)
    for start, item in zip(bucket.starts, EXPERTS, strict=True):
        assert len(rows_in_shards(start, item, bucket.shard)) == 1


def test_matrices_larger_than_a_shard_are_cut() -> None:
    bucket = place(FEW, 64)
    total = sum(item.numel for item in FEW)
    assert max(item.numel for item in FEW) > total / 64
    assert total <= bucket.shard * 64 <= 1.03 * total
    held = [
        len(rows_in_shards(s, item, bucket.shard))
        for s, item in zip(bucket.starts, FEW, strict=True)
    ]
    assert max(held) > 2
    assert sum(held) <= len(FEW) + 63  # an end of a shard cuts one of them


def test_buckets_have_the_size_that_is_asked_for() -> None:
    items = [Item(10, 1)] * 7
    assert buckets(items, None) == [range(7)]
    assert buckets(items, 20) == [range(2), range(2, 4), range(4, 6), range(6, 7)]
    assert buckets(items, 1, least=30) == [range(3), range(3, 7)]
    assert buckets(items, 1, least=1000) == [range(7)]
