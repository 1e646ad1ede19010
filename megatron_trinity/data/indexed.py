"""Checks of Megatron's indexed datasets (`<prefix>.{bin,idx}`) before training opens them.

Layout of an index, little-endian, as `megatron.core.datasets.indexed_dataset` writes it:
magic (9 bytes) | version u64 | dtype code u8 | sequences S u64 | document marks D u64 |
lengths i32[S] | pointers i64[S] (bytes into the .bin) | document marks i64[D] (sequence numbers).
"""

from __future__ import annotations

import math
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_trinity.errors import TrinityError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_DTYPES: dict[int, np.dtype[np.integer]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
"""Upstream's `DType` codes that can hold tokens; its two float types cannot."""

_CHUNK = 1 << 22  # entries looked at together: bounds the memory for any size of dataset
_REMEDY = "make it again with tools/prepare_data.py --overwrite"


@dataclass(frozen=True)
class IndexedDatasetInfo:
    """What an index says, after it was found consistent."""

    sequences: int
    documents: int
    tokens: int
    dtype: np.dtype[np.integer]


def check_indexed_dataset(prefix: str | Path) -> IndexedDatasetInfo:
    """Check that `<prefix>.idx` and `<prefix>.bin` are there, whole and consistent.

    The index is read once, in chunks; of the .bin only the size is looked at.

    Raises:
        TrinityError: one line: which file is missing, truncated or corrupt, and what to do.
    """
    index_path, data_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    index_size, data_size = _file_size(index_path), _file_size(data_path)
    dtype, sequences, marks = read_header(index_path)

    expected = HEADER.size + sequences * 12 + marks * 8
    if index_size != expected:
        raise _size_error(index_path, index_size, expected, "its header")

    pointers_at = HEADER.size + sequences * 4
    marks_at = pointers_at + sequences * 8
    end = _check_pointers(
        index_path,
        _array(index_path, np.dtype("<i4"), HEADER.size, sequences),
        _array(index_path, np.dtype("<i8"), pointers_at, sequences),
        dtype.itemsize,
    )
    _check_marks(index_path, _array(index_path, np.dtype("<i8"), marks_at, marks), sequences)
    if data_size != end:
        raise _size_error(data_path, data_size, end, index_path.name)
    return IndexedDatasetInfo(sequences, marks - 1, end // dtype.itemsize, dtype)


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Entropy in nats of the distribution that `counts` (occurrences of each token, `[v]`) gives.

    A model that has learnt token frequencies and nothing else has this loss. 0 for no tokens.
    """
    present = np.asarray(counts, dtype=np.float64)
    present = present[present > 0]
    if present.size == 0:
        return 0.0
    total = present.sum()
    entropy = math.log(total) - float((present * np.log(present)).sum() / total)
    return max(entropy, 0.0)  # one token only: rounding may leave -0.0 or less


def _file_size(path: Path) -> int:
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error.strerror) from error
    if not stat.S_ISREG(found.st_mode):
        raise _unreadable(path, "not a file")
    return found.st_size


def read_header(path: Path) -> tuple[np.dtype[np.integer], int, int]:
    """Of an index: the type of a token, the number of sequences and that of document marks.

    Raises:
        TrinityError: it is not there, or no index's.
    """
    size = _file_size(path)
    if size < HEADER.size:
        raise _size_error(path, size, HEADER.size, "a header alone")
    try:
        with open(path, "rb") as stream:
            header = stream.read(HEADER.size)
    except OSError as error:
        raise _unreadable(path, error.strerror) from error
    magic, version, code, sequences, marks = HEADER.unpack(header)
    if magic != MAGIC:
        raise _corrupt(path, "it does not start as an indexed dataset does")
    if version != VERSION:
        raise _corrupt(path, f"its version is {version}, not {VERSION}")
    if code not in TOKEN_DTYPES:
        raise _corrupt(path, f"its dtype code {code} is not one of {sorted(TOKEN_DTYPES)}")
    if sequences == 0 or marks < 2:
        raise _corrupt(path, f"it holds {sequences} sequences and {marks - 1} documents")
    return TOKEN_DTYPES[code], sequences, marks


def _array[T: np.generic](
    path: Path, dtype: np.dtype[T], offset: int, count: int
) -> np.memmap[tuple[int], np.dtype[T]]:
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))


def _check_pointers(
    path: Path, lengths: NDArray[np.int32], pointers: NDArray[np.int64], itemsize: int
) -> int:
    """Check that sequences follow one another without gap; return where the last one ends."""
    end = 0
    for part in _chunks(len(lengths)):
        sizes = lengths[part].astype(np.int64) * itemsize
        if sizes.min() < 0:
            raise _corrupt(
                path, f"sequence {part.start + int(sizes.argmin())} has a length below 0"
            )
        ends = end + np.cumsum(sizes, dtype=np.int64)
        wrong = np.flatnonzero(pointers[part] != ends - sizes)
        if wrong.size:
            raise _corrupt(path, f"the pointer of sequence {part.start + int(wrong[0])} is wrong")
        end = int(ends[-1])
    return end


def _check_marks(path: Path, marks: NDArray[np.int64], sequences: int) -> None:
    """Check that document marks go from 0 to the number of sequences and never back."""
    previous = 0
    for part in _chunks(len(marks)):
        chunk = marks[part]
        if chunk[0] < previous or np.any(chunk[1:] < chunk[:-1]):
            raise _corrupt(path, f"document marks {part.start} to {part.stop - 1} go back")
        previous = int(chunk[-1])
    if marks[0] != 0 or previous != sequences:
        raise _corrupt(
            path, f"its documents cover sequences {marks[0]} to {previous}, not 0 to {sequences}"
        )


def _unreadable(path: Path, why: str | None) -> TrinityError:
    return TrinityError(f"{path} cannot be read ({why}): check the path, or {_REMEDY}")


def _size_error(path: Path, size: int, expected: int, who: str) -> TrinityError:
    what = "truncated" if size < expected else "too long"
    return TrinityError(f"{path} is {what}: {size} bytes, {who} asks for {expected}; {_REMEDY}")


def _corrupt(path: Path, detail: str) -> TrinityError:
    return TrinityError(f"{path} is corrupt: {detail}; {_REMEDY}")
