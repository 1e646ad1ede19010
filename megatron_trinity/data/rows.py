"""Packings for supervised data: whole documents in rows, the rest of a row is padding.

A document that fits into a row is never cut. A longer one fills rows of its own, each of which
begins with the last token of the one before it; what is left of it is packed like a document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_trinity.data.packing import Piece
from megatron_trinity.data.permutation import shuffled
from megatron_trinity.errors import UsageError

Fit = Callable[[Sequence[int], int], NDArray[np.int64]]
"""Lengths (`[n]`) and the length of a row to the row of each (`[n]`), all rows from 0 on used."""


def greedy(lengths: Sequence[int], capacity: int) -> NDArray[np.int64]:
    """Each goes behind the one before it, or where it does not fit, into a new row."""
    rows = []
    row, room = -1, 0
    for length in lengths:
        if length > room:
            row, room = row + 1, capacity
        room -= length
        rows.append(row)
    return np.array(rows, dtype=np.int64)


def best_fit(lengths: Sequence[int], capacity: int) -> NDArray[np.int64]:
    """Best fit decreasing: from the longest on, each goes where the least room is left behind it.

    About a microsecond a document, whatever the number of rows.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room in them
    rooms = 0  # bit r is set where a row has room for r tokens
    count = 0
    for item in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = lengths[item]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            row, room, count = count, capacity, count + 1
        rows[item] = row
        if left := room - length:
            with_room[left].append(row)
            rooms |= 1 << left
    return rows


class RowPacking:
    """Samples that are rows of whole documents, packed anew in each epoch; a `Packing`.

    Every token but a document's first is predicted once in an epoch.
    """

    def __init__(
        self, lengths: NDArray[np.int32], seq_length: int, seed: int, *, fit: Fit = best_fit
    ) -> None:
        """`lengths`, `[d]`, are the tokens of each document; 0 is allowed, but not for all.

        Raises:
            UsageError: no document has a token.
        """
        if not lengths.any():
            raise UsageError("there is nothing to pack: the documents are all empty")
        self._lengths, self._seq_length, self._seed, self._fit = lengths, seq_length, seed, fit
        self._epoch = lru_cache(maxsize=2)(self._pack)
        self._begins = [0]  # the first sample of each epoch that is known

    def __len__(self) -> int:
        """Samples of the first epoch."""
        return len(self._epoch(0))

    def pieces(self, index: int) -> Sequence[Piece]:
        """The pieces of sample `index`: up to `seq_length + 1` tokens, the rest is padding."""
        if index < 0:
            raise IndexError(index)
        while index >= self._begins[-1]:
            self._begins.append(self._begins[-1] + len(self._epoch(len(self._begins) - 1)))
        epoch = int(np.searchsorted(self._begins, index, side="right")) - 1
        return self._epoch(epoch).row(index - self._begins[epoch])

    def _pack(self, epoch: int) -> _Rows:
        order = shuffled(len(self._lengths), "rows: documents", self._seed, epoch)
        documents, starts, lengths = _cut(order, self._lengths[order], self._seq_length)
        rows = self._fit(lengths.tolist(), self._seq_length + 1)
        by_row = np.argsort(rows, kind="stable")
        ends = np.cumsum(np.bincount(rows))
        places = shuffled(len(ends), "rows", self._seed, epoch)
        return _Rows(documents[by_row], starts[by_row], lengths[by_row], ends, places)


def _cut(
    order: NDArray[np.integer], lengths: NDArray[np.int32], seq_length: int
) -> tuple[NDArray[np.integer], NDArray[np.int64], NDArray[np.int64]]:
    """Documents in pieces of `seq_length + 1` tokens at most: document, start and length of each.

    A piece begins with the last token of the piece before it, so a document of n tokens, whose
    n - 1 predictions are dealt out, has a piece for each `seq_length` of them.
    """
    counts = np.where(
        lengths > 0, np.maximum(-(-(lengths.astype(np.int64) - 1) // seq_length), 1), 0
    )
    documents = np.repeat(order, counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = number * seq_length
    left = np.repeat(lengths, counts) - starts
    return documents, starts, np.minimum(left, seq_length + 1)


@dataclass(frozen=True)
class _Rows:
    """An epoch: its pieces, those of a row together."""

    documents: NDArray[np.integer]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    ends: NDArray[np.int64]  # behind the last piece of each row
    places: NDArray[np.integer]  # which row each sample is

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, sample: int) -> list[Piece]:
        row = int(self.places[sample])
        these = slice(int(self.ends[row - 1]) if row else 0, int(self.ends[row]))
        columns = (self.documents[these], self.starts[these], self.lengths[these])
        return [Piece(*piece) for piece in zip(*(c.tolist() for c in columns), strict=True)]
