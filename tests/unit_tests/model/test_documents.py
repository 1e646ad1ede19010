"""Documents from cumulative lengths, against plain counting."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_trinity.model.documents import Documents, Segments


def test_values() -> None:
    cu_seqlens = torch.tensor([[0, 1, 4, 6, 6], [0, 6, 6, 6, 6]], dtype=torch.int32)
    documents = Documents.from_cu_seqlens(cu_seqlens, 6)
    assert documents.starts.tolist() == [[0, 1, 1, 1, 4, 4], [0] * 6]
    assert documents.ids.tolist() == [[0, 1, 1, 1, 2, 2], [3] * 6]
    assert documents.lengths.tolist() == [1, 3, 2, 6]
    # RoPE has the positions of the sequence, whose shape Megatron keeps.
    assert (documents.max_seqlen_q, documents.max_seqlen_kv) == (6, 6)
    assert documents.qkv_format == "sbhd"


def test_padding_is_a_document_that_counts_for_nothing() -> None:
    cu_seqlens = torch.tensor([[0, 1, 4, 4, 4], [0, 6, 6, 6, 6], [0, 0, 0, 0, 0]])
    documents = Documents.from_cu_seqlens(cu_seqlens, 6, padded=True)
    assert documents.padding is not None
    assert documents.padding.tolist() == [[False] * 4 + [True] * 2, [False] * 6, [True] * 6]
    assert documents.starts.tolist() == [[0, 1, 1, 1, 4, 4], [0] * 6, [0] * 6]
    assert documents.lengths.tolist() == [1, 3, 2, 6, 6]
    assert documents.counted.tolist() == [1, 3, 0, 6, 0]
    assert documents.shares.tolist() == [0.25, 0.75, 0.0, pytest.approx(1.0), 0.0]
    full = Documents.from_cu_seqlens(torch.tensor([[0, 2, 6, 6]]), 6)
    assert full.padding is None
    assert full.counted is full.lengths
    assert full.shares.tolist() == pytest.approx([2 / 6, 4 / 6])


@given(st.lists(st.lists(st.integers(1, 5), min_size=7, max_size=7), min_size=1, max_size=3))
def test_any_lengths(rows: list[list[int]]) -> None:
    length = max(sum(lengths) for lengths in rows)
    # The last document fills the sequence; a row of cumulative lengths is padded with s.
    rows = [[*lengths, length - sum(lengths)] for lengths in rows]
    cumulative = [[sum(lengths[:n]) for n in range(9)] + [length] * 3 for lengths in rows]
    documents = Documents.from_cu_seqlens(torch.tensor(cumulative, dtype=torch.int32), length)
    flat = [size for lengths in rows for size in lengths if size]
    assert documents.lengths.tolist() == flat
    assert documents.ids.flatten().tolist() == [
        n for n, size in enumerate(flat) for _ in range(size)
    ]
    assert documents.starts.tolist() == [
        [sum(lengths[:n]) for n, size in enumerate(lengths) for _ in range(size)]
        for lengths in rows
    ]


ROWS = st.lists(st.integers(1, 9), min_size=1, max_size=12).filter(lambda x: sum(x) <= 24)


@given(st.lists(ROWS, min_size=1, max_size=3), st.data())
def test_segments_are_what_each_query_sees(rows: list[list[int]], data: st.DataObject) -> None:
    """Of any run of queries over any keys that end with them, a token at a time."""
    length = 24
    rows = [[*lengths, *([length - sum(lengths)] * (sum(lengths) < length))] for lengths in rows]
    cumulative = torch.full((len(rows), 14), length, dtype=torch.int32)
    for row, lengths in zip(cumulative, rows, strict=True):
        row[: len(lengths) + 1] = torch.tensor([0, *lengths]).cumsum(0)
    documents = Documents.from_cu_seqlens(cumulative, length)
    position = data.draw(st.integers(0, length - 1))
    queries = data.draw(st.integers(1, length - position))
    keys = data.draw(st.integers(queries, position + queries))

    segments = documents.segments(position, queries, keys)
    first_key = position + queries - keys
    expected = [
        [
            (row, query, range(max(int(documents.starts[row, query]), first_key), query + 1))
            for query in range(position, position + queries)
        ]
        for row in range(len(rows))
    ]
    assert seen(segments, position, queries, first_key) == [one for row in expected for one in row]
    assert segments.longest_queries == segments.cu_queries.diff().max()
    assert segments.longest_keys == segments.cu_keys.diff().max()
    assert segments.cu_keys.dtype == segments.cu_queries.dtype == torch.int32
    assert documents.segments(position, queries, keys) is segments, "made once for all layers"


def seen(
    segments: Segments, position: int, queries: int, first_key: int
) -> list[tuple[int, int, range]]:
    """Sequence and position of each query, and positions of the keys that it sees in a segment."""
    tokens = [
        (row, key)
        for row, unseen in enumerate(segments.unseen)
        for key in range(first_key + unseen, position + queries)
    ]
    result = []
    of_queries = segments.cu_queries.tolist()
    of_keys = segments.cu_keys.tolist()
    for (begin, end), (first, last) in zip(pairwise(of_queries), pairwise(of_keys), strict=True):
        part = tokens[first:last]
        for number in range(end - begin):
            own = len(part) - (end - begin) + number  # the queries are the last of the keys
            row, query = part[own]
            assert {of for of, _ in part} == {row}
            result.append((row, query, range(part[0][1], query + 1)))
    return result
