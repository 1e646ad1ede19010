"""Slices cover a tensor once, are boxes of it, and know what lies in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_trinity.checkpoint.conversion.rows import Piece, row_count
from megatron_trinity.checkpoint.conversion.slices import Slice, not_finite, overlaps, slices


@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 9)),
        st.tuples(st.integers(1, 9), st.integers(1, 5)),
        st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5)),
    ),
    max_bytes=st.integers(1, 200),
    multiple=st.integers(1, 4),
)
@example(shape=(9, 3), max_bytes=18, multiple=2)  # three rows would fit
@example(shape=(2, 9, 3), max_bytes=5, multiple=4)  # not a row would
def test_slices_are_boxes_that_cover_a_tensor_once(
    shape: tuple[int, ...], max_bytes: int, multiple: int
) -> None:
    seen = np.zeros(shape, dtype=int)
    flat = np.arange(seen.size).reshape(row_count(shape), shape[-1])
    height = shape[-2] if len(shape) > 1 else 1
    for part in slices(shape, 2, max_bytes, multiple):
        offsets, sizes = part.box(shape)
        box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        seen[box] += 1
        rows = flat[part.row : part.row + part.rows].ravel()
        assert np.array_equal(np.arange(seen.size).reshape(shape)[box].ravel(), rows)
        assert part.rows <= multiple or part.rows * shape[-1] * 2 <= max_bytes
        assert part.row % height % multiple == 0
        assert part.rows % multiple == 0 or (part.row + part.rows) % height == 0
    assert (seen == 1).all()


def test_what_lies_in_a_slice() -> None:
    pieces = [Piece("a", 5, 0, 4), Piece("b", 0, 4, 2), Piece("a", 9, 6, 10)]
    assert list(overlaps(pieces, Slice(3, 4))) == [
        Piece("a", 8, 0, 1),
        Piece("b", 0, 1, 2),
        Piece("a", 9, 3, 1),
    ]
    assert list(overlaps(pieces, Slice(6, 2))) == [Piece("a", 9, 0, 2)]
    assert list(overlaps(pieces, Slice(15, 5))) == [Piece("a", 18, 0, 1)]
    assert list(overlaps(pieces, Slice(16, 5))) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_that_are_not_finite_are_counted(dtype: torch.dtype) -> None:
    values = torch.randn(7, 100).to(dtype)
    assert not_finite(values) == 0
    values[0, 0], values[3, 5], values[6, 99] = torch.nan, torch.inf, -torch.inf
    assert not_finite(values) == 3
    assert not_finite(values[3]) == 1
    assert not_finite(values[4]) == 0
