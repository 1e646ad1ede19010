"""Boxes: parts of whole tensors, and how often a tensor is covered by them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Box:
    """A part of a canonical tensor, see `shards`.

    Attributes:
        start, stop: corners, on every axis of the whole tensor.
        whole: shape of the whole tensor.
    """

    key: str
    start: tuple[int, ...]
    stop: tuple[int, ...]
    whole: tuple[int, ...]


def cover(boxes: Mapping[Box, int]) -> dict[str, tuple[int, int]]:
    """How often each tensor is held, in the place where that is least and where it is most.

    Args:
        boxes: parts of tensors, and how many ranks hold each.
    Returns: key to (fewest, most); equal where every value of the tensor is on as many ranks.
    """
    of_key: dict[str, list[tuple[Box, int]]] = defaultdict(list)
    for box, count in boxes.items():
        of_key[box.key].append((box, count))
    return {key: _fewest_and_most(parts) for key, parts in of_key.items()}


def _fewest_and_most(parts: list[tuple[Box, int]]) -> tuple[int, int]:
    # The corners of all boxes cut the tensor into cells that no box divides.
    edges = [
        np.unique(
            [0, size, *(edge for box, _ in parts for edge in (box.start[axis], box.stop[axis]))]
        )
        for axis, size in enumerate(parts[0][0].whole)
    ]
    held = np.zeros([len(edge) - 1 for edge in edges], dtype=np.int64)
    for box, count in parts:
        first = (np.searchsorted(edge, at) for edge, at in zip(edges, box.start, strict=True))
        behind = (np.searchsorted(edge, at) for edge, at in zip(edges, box.stop, strict=True))
        held[tuple(slice(a, b) for a, b in zip(first, behind, strict=True))] += count
    return int(held.min()), int(held.max())
