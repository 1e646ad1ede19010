"""Files of an import, each written by one process; in a module that is quick to import."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
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


def write_import_file(job: FileJob, report: Report) -> tuple[list[WriteResult], Counter[str]]:
    """Write one file; also returns the values of each source that are not finite."""
    nonfinite: Counter[str] = Counter()

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
            _read(source, target)
            bad = not_finite(target)
            if bad:
                nonfinite[source.name] += bad
        report(values.nbytes)
        return values

    results = write_file(job.directory, job.plan, resolve)
    if nonfinite and not job.allow_nonfinite:
        name, bad = next(iter(nonfinite.items()))
        raise TrinityError(f"{name} has {bad} values that are not finite")
    return results, nonfinite


def _read(source: Source, target: Tensor) -> None:
    """Fill `target` with a source's rows.

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
