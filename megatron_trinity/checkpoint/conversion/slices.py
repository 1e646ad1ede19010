"""Cutting tensors into slices that fit into memory, and what of other tensors lies in a slice.

A slice is a run of rows that is a box of its tensor: of a stack of experts, rows of one expert.
Rows are counted over all axes but the last.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_trinity.checkpoint.conversion.rows import Piece, Shape, row_count


@dataclass(frozen=True)
class Slice:
    """Rows `row` to `row + rows` of a tensor."""

    row: int
    rows: int

    def box(self, shape: Shape) -> tuple[Shape, Shape]:
        """Where the slice begins on each axis of a tensor of `shape`, and its size there."""
        *lead, height, width = (1, *shape) if len(shape) == 1 else shape
        if len(shape) == 1:
            return (0,), (width,)
        if not lead:
            return (self.row, 0), (self.rows, width)
        return (self.row // height, self.row % height, 0), (1, self.rows, width)


def slices(shape: Shape, itemsize: int, max_bytes: int, multiple: int = 1) -> Iterator[Slice]:
    """Cut a tensor of one to three axes into slices of at most `max_bytes`.

    They begin at a multiple of `multiple` rows, and have so many at least, whatever `max_bytes` is.
    """
    fitting = max_bytes // (shape[-1] * itemsize)
    most = max(multiple, fitting // multiple * multiple)
    height = shape[-2] if len(shape) > 1 else 1
    for first in range(0, row_count(shape), height):
        for row in range(0, height, most):
            yield Slice(first + row, min(most, height - row))


def overlaps(pieces: Sequence[Piece], part: Slice) -> Iterator[Piece]:
    """What of `pieces`, which are in the order of their rows, lies in `part`.

    The rows of what is yielded count from the start of `part`.
    """
    end = part.row + part.rows
    first = max(0, bisect_right(pieces, part.row, key=lambda piece: piece.row) - 1)
    for piece in pieces[first:]:
        if piece.row >= end:
            break
        row, stop = max(piece.row, part.row), min(piece.row + piece.rows, end)
        if row < stop:
            yield Piece(piece.hf, piece.hf_row + row - piece.row, row - part.row, stop - row)


def not_finite(values: Tensor) -> int:
    """How many values are infinite or not a number."""
    low, high = torch.aminmax(values)  # one pass; both are NaN where a value is
    if torch.isfinite(low) and torch.isfinite(high):
        return 0
    return int((~torch.isfinite(values)).sum())
