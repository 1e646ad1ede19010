"""Documents from cumulative lengths, against plain counting."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_trinity.model.documents import Documents


def test_values() -> None:
    cu_seqlens = torch.tensor([[0, 1, 4, 6, 6], [0, 6, 6, 6, 6]], dtype=torch.int32)
    documents = Documents.from_cu_seqlens(cu_seqlens, 6)
    assert documents.starts.tolist() == [[0, 1, 1, 1, 4, 4], [0] * 6]
    assert documents.ids.tolist() == [[0, 1, 1, 1, 2, 2], [3] * 6]
    assert documents.lengths.tolist() == [1, 3, 2, 6]
    # RoPE has the positions of the sequence, whose shape Megatron keeps.
    assert (documents.max_seqlen_q, documents.max_seqlen_kv) == (6, 6)
    assert documents.qkv_format == "sbhd"


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
