"""Writes Megatron's indexed datasets in memory that does not grow with them.

Ids go to `<split>.bin` and lengths to `<split>.lengths`, both to be gone on with after a kill; the
index is made of the lengths in the end. Its layout is that which `indexed` reads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megatron_trinity.data import manifest
from megatron_trinity.data.documents import SkipReport
from megatron_trinity.data.encode import Encoded
from megatron_trinity.data.indexed import HEADER, MAGIC, TOKEN_DTYPES, VERSION, unigram_entropy
from megatron_trinity.data.token_model import token_dtype
from megatron_trinity.errors import TrinityError

_LENGTHS = 1 << 20  # looked at together
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Written:
    """How much of a split is in its files."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


class SplitWriter:
    """One split's ids and lengths, from what is `written` already on."""

    def __init__(
        self,
        stem: Path,
        vocab_size: int,
        written: Written | None = None,
        counts: NDArray[np.int64] | None = None,
    ) -> None:
        self.written = written or Written()
        self.counts = np.zeros(vocab_size, dtype=np.int64) if counts is None else counts
        self.dtype = token_dtype(vocab_size)
        self._bin = self._open(Path(f"{stem}.bin"), self.written.tokens * self.dtype.itemsize)
        self._lengths = self._open(Path(f"{stem}.lengths"), self.written.documents * 4)

    @staticmethod
    def _open(path: Path, size: int) -> IO[bytes]:
        stream = open(path, "r+b" if size else "wb")  # noqa: SIM115
        stream.truncate(size)
        stream.seek(size)
        return stream

    def add(self, encoded: Encoded) -> None:
        self._bin.write(encoded.ids.tobytes())
        self._lengths.write(encoded.lengths.astype("<i4").tobytes())
        self.counts += np.bincount(encoded.ids, minlength=len(self.counts))
        self.written = Written(
            self.written.documents + len(encoded.lengths),
            self.written.tokens + len(encoded.ids),
            self.written.text_bytes + encoded.text_bytes,
        )

    def flush(self) -> None:
        """Put on the disk what was added."""
        for stream in (self._bin, self._lengths):
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        self._bin.close()
        self._lengths.close()


def describe_split(written: Written, counts: NDArray[np.int64], sha256: str) -> dict[str, Any]:
    """A split as a manifest has it."""
    present = np.flatnonzero(counts)
    return {
        "documents": written.documents,
        "tokens": written.tokens,
        "bytes": written.text_bytes,
        "dtype": token_dtype(len(counts)).name,
        "max_token_id": int(present[-1]) if present.size else None,
        "unigram_entropy_nats": unigram_entropy(counts),
        "sha256": sha256,
    }


def dataset_files(output: Path) -> dict[str, Path]:
    """Where the files of both splits of `output` stand, by their names while they are made."""
    return {
        f"{split}{suffix}": Path(f"{output}_{split}{suffix}")
        for split in ("train", "valid")
        for suffix in (".bin", ".idx")
    }


def publish_datasets(work: Path, output: Path, made: Mapping[str, Any]) -> None:
    """Move the datasets in `work` into place, with the manifest `made` last.

    A split that it does not have, of an earlier run, is removed.
    """
    files = dataset_files(output)
    staged = {
        work / name: place for name, place in files.items() if Path(name).stem in made["splits"]
    }
    stale = set(files.values()) - set(staged.values())
    manifest.publish(staged, made, Path(f"{output}.json"), work, stale)


def refuse_empty(
    splits: Mapping[str, Mapping[str, Any]],
    sources: Sequence[str],
    valid_fraction: float,
    report: SkipReport,
) -> None:
    """Refuse a result without documents, or without those of one split.

    Raises:
        TrinityError: one line, with what was left out.
    """
    total = sum(split["documents"] for split in splits.values())
    if total == 0:
        left_out = "".join(f"; {line}" for line in report.summary(shown=1))
        raise TrinityError(f"no documents in {', '.join(sources)}{left_out}")
    for name, split in splits.items():
        if split["documents"] == 0:
            raise TrinityError(
                f"of {total} documents none fell to {name} with --valid-fraction "
                f"{valid_fraction}: choose another fraction (0: no validation), or give "
                "more documents"
            )


def write_index(lengths: Path, index: Path, dtype: np.dtype[np.integer]) -> None:
    """Write the index of documents with these lengths (int32, `lengths` is a file of them)."""
    count = lengths.stat().st_size // 4
    code = next(code for code, known in TOKEN_DTYPES.items() if known == dtype)
    with open(index, "wb") as out:
        out.write(HEADER.pack(MAGIC, VERSION, code, count, count + 1))
        with open(lengths, "rb") as stream:
            while block := stream.read(_BLOCK):
                out.write(block)
        end = 0
        with open(lengths, "rb") as stream:
            while block := stream.read(4 * _LENGTHS):
                sizes = np.frombuffer(block, dtype="<i4").astype(np.int64) * dtype.itemsize
                ends = end + np.cumsum(sizes)
                out.write((ends - sizes).astype("<i8").tobytes())
                end = int(ends[-1])
        for start in range(0, count + 1, _LENGTHS):
            out.write(np.arange(start, min(start + _LENGTHS, count + 1), dtype="<i8").tobytes())
