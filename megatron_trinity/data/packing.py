"""What a sequence is made of: pieces of documents, by the number of the sequence alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


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
