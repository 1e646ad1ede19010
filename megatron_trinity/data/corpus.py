"""The documents of a source: their lengths, and the tokens of a piece of one."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_trinity.data.indexed import HEADER, read_header
from megatron_trinity.data.length_bias import LengthBias
from megatron_trinity.data.packing import Piece

OPEN_AT_ONCE = 128
"""Datasets that a process has mapped; another source is opened in some microseconds."""


@dataclass(frozen=True)
class Part:
    """A share of the documents of an indexed dataset, as `--split` divides it."""

    prefix: str
    begin: float = 0.0
    end: float = 1.0

    @property
    def whole(self) -> bool:
        return (self.begin, self.end) == (0.0, 1.0)


class Corpus:
    """Documents of one or more indexed datasets, numbered through.

    Nothing is read before it is asked for. What Megatron calls a sequence is a document here, as
    it is in its GPT dataset. The datasets are taken to be whole: see `check_indexed_dataset`.
    """

    def __init__(
        self, parts: Sequence[Part], length_bias: LengthBias | None = None, seed: int = 0
    ) -> None:
        """`length_bias`: which documents are taken; the others count as empty."""
        self._parts, self._length_bias, self._seed = parts, length_bias, seed

    @cached_property
    def documents(self) -> int:
        """How many there are, those without tokens included."""
        return int(self._firsts[-1])

    @cached_property
    def tokens(self) -> int:
        """Tokens of all documents."""
        if self._length_bias is not None or not all(part.whole for part in self._parts):
            return int(self.lengths.sum(dtype=np.int64))
        return sum(
            os.stat(f"{part.prefix}.bin").st_size // _header(part.prefix)[0].itemsize
            for part in self._parts
        )

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document, `[documents]`."""
        found = [
            np.fromfile(
                f"{part.prefix}.idx",
                dtype="<i4",
                count=stop - start,
                offset=HEADER.size + 4 * start,
            )
            for part, (start, stop) in zip(self._parts, self._ranges, strict=True)
        ]
        lengths = found[0] if len(found) == 1 else np.concatenate(found)
        if self._length_bias is not None:
            lengths = self._length_bias.taken(lengths, self._seed)
        return lengths

    def read(self, piece: Piece, out: NDArray[np.int64]) -> None:
        """Write the tokens of `piece` into `out`, `[piece.length]`."""
        part, number = self._place(piece.document)
        tokens, pointers = _mapped(self._parts[part].prefix)
        start = int(pointers[number]) // tokens.itemsize + piece.start
        out[:] = tokens[start : start + piece.length]

    def named(self, document: int) -> str:
        """A document in words, for messages."""
        part, number = self._place(document)
        return f"document {number} of {self._parts[part].prefix}"

    def _place(self, document: int) -> tuple[int, int]:
        """Which dataset, and the number of the document in it."""
        part = 0
        if len(self._parts) > 1:
            part = int(self._firsts.searchsorted(document, side="right")) - 1
        return part, document - int(self._firsts[part]) + self._ranges[part][0]

    @cached_property
    def _ranges(self) -> list[tuple[int, int]]:
        """The first document of each part in its dataset, and the one behind the last."""
        ranges = []
        for part in self._parts:
            count = _header(part.prefix)[1]
            ranges.append((round(part.begin * count), round(part.end * count)))
        return ranges

    @cached_property
    def _firsts(self) -> NDArray[np.int64]:
        counts = [stop - start for start, stop in self._ranges]
        return np.cumsum([0, *counts], dtype=np.int64)


def _header(prefix: str) -> tuple[np.dtype[np.integer], int]:
    """The type of a token, and how many documents there are."""
    dtype, documents, _ = read_header(Path(f"{prefix}.idx"))
    return dtype, documents


@lru_cache(maxsize=OPEN_AT_ONCE)
def _mapped(prefix: str) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """The tokens of a dataset, and where in the file each document begins, in bytes."""
    dtype, documents = _header(prefix)
    pointers = np.frombuffer(
        _map(f"{prefix}.idx"), dtype="<i8", count=documents, offset=HEADER.size + 4 * documents
    )
    return np.frombuffer(_map(f"{prefix}.bin"), dtype=dtype.newbyteorder("<")), pointers


def _map(path: str) -> mmap.mmap:
    with open(path, "rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
