"""Rows of tensors, in which conversions count: over all axes but the last."""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


def row_count(shape: Shape) -> int:
    """Rows of a tensor: over all axes but the last; a vector is one row."""
    return math.prod(shape[:-1])


@dataclass(frozen=True)
class Piece:
    """A run of rows of a Hugging Face tensor, and where it stands in a Trinity tensor."""

    hf: str
    hf_row: int
    row: int
    rows: int
