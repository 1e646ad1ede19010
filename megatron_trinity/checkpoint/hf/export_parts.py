"""Parts of safetensors files, each written by one process; in a module that is quick to import."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_trinity.checkpoint.conversion.slices import Slice, not_finite
from megatron_trinity.checkpoint.conversion.tasks import Report
from megatron_trinity.checkpoint.conversion.tensor_bytes import write_from
from megatron_trinity.checkpoint.fp8.bands import Band, Quantized, write_band
from megatron_trinity.checkpoint.hf.safetensors_files import FileLayout
from megatron_trinity.checkpoint.torch_dist.read import TorchDistTensors, tensors_of
from megatron_trinity.errors import TrinityError

PART_BYTES = 2**28
"""Bytes from which a part is complete: small enough that processes end at about the same time."""


@dataclass(frozen=True)
class Target:
    """Rows of a slice, and where in a file they go as rows of a Hugging Face tensor."""

    name: str
    dtype: torch.dtype
    offset: int
    row: int
    rows: int
    nbytes: int


@dataclass(frozen=True)
class Read:
    """A slice of a tensor, by its canonical name, and where it goes."""

    key: str
    part: Slice
    targets: tuple[Target, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return sum(target.nbytes for target in self.targets)


@dataclass(frozen=True)
class PartJob:
    """What of the checkpoint goes into a part of a file."""

    iteration: Path
    file: Path
    items: tuple[Read | Band, ...]
    allow_nonfinite: bool

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return sum(item.nbytes for item in self.items)


@dataclass(frozen=True)
class WrittenPart:
    """What became of a part.

    Attributes:
        file: that it is in; the disk may not have it yet.
        nonfinite: name of a tensor to its values that are not finite, if it has any.
        matrices: name of a matrix in FP8 to how it was rounded.
    """

    file: Path
    nonfinite: Counter[str]
    matrices: dict[str, Quantized]


def parts(items: Iterable[Read | Band]) -> Iterator[tuple[Read | Band, ...]]:
    """Cut what goes into a file into parts."""
    part: list[Read | Band] = []
    size = 0
    for item in items:
        part.append(item)
        size += item.nbytes
        if size >= PART_BYTES:
            yield tuple(part)
            part, size = [], 0
    if part:
        yield tuple(part)


def begin_file(path: Path, layout: FileLayout) -> None:
    """Write the header of a file, and make room for the rest; parts that are there stay."""
    with open(path, "r+b" if path.exists() else "wb") as stream:
        stream.write(layout.header)
        stream.truncate(layout.size)


def write_part(job: PartJob, report: Report) -> WrittenPart:
    """Write a part of a file.

    Raises:
        TrinityError: a tensor cannot be read, or is not finite.
    """
    checkpoint = tensors_of(job.iteration)
    nonfinite: Counter[str] = Counter()
    matrices: dict[str, Quantized] = defaultdict(Quantized)
    with open(job.file, "r+b", buffering=0) as stream:
        for item in job.items:
            if isinstance(item, Band):
                done = write_band(checkpoint, item, stream.fileno())
                matrices[item.name] += done
                nonfinite[item.name] += done.nonfinite
            else:
                _write_slice(checkpoint, item, stream.fileno(), nonfinite)
            report(item.nbytes)
    nonfinite = +nonfinite  # those that have any
    if nonfinite and not job.allow_nonfinite:
        name, bad = next(iter(nonfinite.items()))
        raise TrinityError(f"{name} has {bad} values that are not finite")
    return WrittenPart(job.file, nonfinite, dict(matrices))


def _write_slice(
    checkpoint: TorchDistTensors, read: Read, descriptor: int, nonfinite: Counter[str]
) -> None:
    values = checkpoint.rows(read.key, read.part.row, read.part.rows)
    for target in read.targets:
        rows = values[target.row : target.row + target.rows].to(target.dtype)
        nonfinite[target.name] += not_finite(rows)
        write_from(descriptor, target.offset, rows)
