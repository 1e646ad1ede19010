"""Files of an import, each written by one process; in a module that is quick to import."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_trinity.checkpoint.conversion.slices import not_finite
from megatron_trinity.checkpoint.conversion.tasks import Report
from megatron_trinity.checkpoint.conversion.tensor_bytes import read_into
from megatron_trinity.checkpoint.hf.safetensors_files import DTYPES, StoredTensor
from megatron_trinity.checkpoint.torch_dist.write import write_file
from megatron_trinity.errors import TrinityError


@dataclass(frozen=True)
class Source:
    """Rows of a Hugging Face tensor that become rows of a slice."""

    name: str
    stored: StoredTensor
    hf_row: int
    row: int
    rows: int


@dataclass(frozen=True)
class FileJob:
    """A file of the checkpoint: its slices, and what each of them is made of."""

    directory: Path
    plan: SavePlan
    sources: dict[Any, tuple[Source, ...]]
    allow_nonfinite: bool


@dataclass(frozen=True)
class WrittenFile:
    """What became of a file; values are counted by the name of their Hugging Face tensor.

    Attributes:
        results: of the writer.
        nonfinite: values that are not finite, in the checkpoint.
        overflowed: those of them that were finite before they were converted.
        rounded: finite values that converting has changed.
    """

    results: list[WriteResult]
    nonfinite: Counter[str] = field(default_factory=Counter)
    overflowed: Counter[str] = field(default_factory=Counter)
    rounded: Counter[str] = field(default_factory=Counter)


def write_import_file(job: FileJob, report: Report) -> WrittenFile:
    """Write one file of a checkpoint."""
    file = WrittenFile([])

    def resolve(item: WriteItem) -> Tensor:
        data = item.tensor_data
        assert data is not None
        assert data.chunk is not None
        values = torch.empty(data.chunk.sizes, dtype=data.properties.dtype)
        rows = values.view(-1, values.shape[-1])
        sources = job.sources[item.index]
        if sum(source.rows for source in sources) < len(rows):
            rows.zero_()  # those that the vocabulary is padded with
        for source in sources:
            target = rows[source.row : source.row + source.rows]
            read = _read(source, target)
            bad = not_finite(target)
            if bad:
                file.nonfinite[source.name] += bad
                # Unary plus leaves out counts of zero.
                file.overflowed.update(+Counter({source.name: bad - not_finite(read)}))
            if read is not target:
                changed = int(((target != read) & target.isfinite()).sum())
                file.rounded.update(+Counter({source.name: changed}))
        report(values.nbytes)
        return values

    file.results.extend(write_file(job.directory, job.plan, resolve))
    if file.nonfinite and not job.allow_nonfinite:
        name, bad = next(iter(file.nonfinite.items()))
        raise TrinityError(f"{name} has {bad} values that are not finite{_why(file, name)}")
    return file


def _why(file: WrittenFile, name: str) -> str:
    overflowed = file.overflowed[name]
    return f", {overflowed} of them too large for the type; take --dtype fp32" if overflowed else ""


def _read(source: Source, target: Tensor) -> Tensor:
    """Fill `target` with a source's rows, which are returned as they are in the file.

    Raises:
        TrinityError: its file changed after it was checked.
    """
    stored = source.stored
    dtype = DTYPES[stored.dtype]
    rows = target if target.dtype == dtype else torch.empty_like(target, dtype=dtype)
    offset = stored.offset + source.hf_row * stored.shape[-1] * dtype.itemsize
    try:
        with open(stored.file, "rb") as stream:
            read_into(stream.fileno(), offset, rows)
    except OSError as error:
        raise TrinityError(f"{stored.file} cannot be read: {error}") from error
    if rows is not target:
        target.copy_(rows)
    return rows
