"""What a sequence is made of: pieces of documents, by the number of the sequence alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_trinity.data.permutation import Permutation, shuffled

KEPT_DOCUMENTS = 1 << 20
"""Of a source with fewer documents, as many epochs are kept as have so many in all."""


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one document."""

    document: int  # number of the document in its source
    start: int  # first token of it
    length: int  # tokens


class Packing(Protocol):
    """Sequences of one source, each a pure function of (seed, its index)."""

    def pieces(self, index: int) -> Sequence[Piece]:
        """The pieces of sample `index`: 0, 1, 2 and so on, without end where the source repeats.

        Their lengths sum to `seq_length + 1`, one token of look-ahead, which the next sample
        starts with; or to less where the rest is padding.
        """
        ...

    def __len__(self) -> int:
        """Samples of one epoch, where that is defined."""
        ...


class SequentialPacking:
    """Documents one behind the other, over all epochs without a break, cut into samples.

    The documents of an epoch are in an order of (seed, epoch). A sample begins with the last token
    of the one before it in the stream, so every token is predicted once an epoch and none is left
    out; the first token of all alone follows nothing. Samples that begin in an epoch are read in
    an order of (seed, epoch) as well; the last of them may end in the next one.

    Memory: 12 bytes a document for each of the epochs that are kept: two, of a small source more,
    since a blend that is shuffled reads from several in turn.
    """

    def __init__(
        self, lengths: NDArray[np.int32], seq_length: int, seed: int, *, shuffle: bool = True
    ) -> None:
        """`lengths`, `[d]`, are the tokens of each document; 0 is allowed, but not for all.

        Without `shuffle` a sample goes on where the one before it stopped.
        """
        self._shuffled = shuffle
        self._lengths, self._seq_length, self._seed = lengths, seq_length, seed
        self._tokens = int(lengths.sum(dtype=np.int64))
        kept = 2 + KEPT_DOCUMENTS // len(lengths)
        self._epoch = lru_cache(maxsize=kept)(self._make_epoch)
        self._shuffle = lru_cache(maxsize=kept)(self._make_shuffle)

    def __len__(self) -> int:
        """Samples that begin in the first epoch."""
        return self._first_of(1)

    def pieces(self, index: int) -> Sequence[Piece]:
        """The pieces of sample `index`, `seq_length + 1` tokens in all."""
        epoch = index * self._seq_length // self._tokens
        first = self._first_of(epoch)
        sample = first + self._shuffle(epoch)[index - first] if self._shuffled else index
        position = sample * self._seq_length
        pieces: list[Piece] = []
        left = self._seq_length + 1
        while left:
            epoch, offset = divmod(position, self._tokens)
            found = self._epoch(epoch).cut(offset, left)
            pieces += found
            taken = sum(piece.length for piece in found)
            position, left = position + taken, left - taken
        return pieces

    def _first_of(self, epoch: int) -> int:
        """The first sample in the stream that begins in `epoch`."""
        return -(-epoch * self._tokens // self._seq_length)

    def _make_epoch(self, epoch: int) -> Row:
        return Row(self._lengths, shuffled(len(self._lengths), "documents", self._seed, epoch))

    def _make_shuffle(self, epoch: int) -> Permutation:
        size = self._first_of(epoch + 1) - self._first_of(epoch)
        return Permutation(size, "samples", self._seed, epoch)


class OnePass:
    """Each document once, one behind the other; the last sample is short, the rest is padding.

    The order of the documents is always the same, so that evaluations of all runs can be compared.
    """

    def __init__(self, lengths: NDArray[np.int32], seq_length: int) -> None:
        self._seq_length = seq_length
        self._row = Row(lengths, shuffled(len(lengths), "one pass"))

    def __len__(self) -> int:
        return max(-(-(self._row.tokens - 1) // self._seq_length), 1)

    def pieces(self, index: int) -> Sequence[Piece]:
        """The pieces of sample `index`, below `len(self)`."""
        return self._row.cut(index * self._seq_length, self._seq_length + 1)


class Row:
    """Documents in an order, one behind the other."""

    def __init__(self, lengths: NDArray[np.int32], order: NDArray[np.integer]) -> None:
        """`order`, `[d]`: the number of the document at each place."""
        self._order = order
        self._ends = np.cumsum(lengths[order], dtype=np.int64)
        self.tokens = int(self._ends[-1])

    def cut(self, offset: int, count: int) -> list[Piece]:
        """The pieces of the `count` tokens from `offset` on, or of those that there are."""
        place = int(self._ends.searchsorted(offset, side="right"))
        stop = min(offset + count, self.tokens)
        start = int(self._ends[place - 1]) if place else 0  # of the document, in the row
        pieces = []
        while offset < stop:
            end = int(self._ends[place])
            if end > offset:  # a document may have no token
                length = min(end, stop) - offset
                pieces.append(Piece(int(self._order[place]), offset - start, length))
                offset += length
            start, place = end, place + 1
        return pieces
