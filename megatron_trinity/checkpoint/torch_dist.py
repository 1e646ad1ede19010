"""Reading a Megatron `torch_dist` checkpoint by rows, without its model and on one process."""

from __future__ import annotations

import functools
import math
import warnings
from argparse import Namespace
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_trinity.checkpoint.hf_mapping import Shape, row_count
from megatron_trinity.checkpoint.safe_read import READ_ERRORS, read_common_state, read_metadata
from megatron_trinity.checkpoint.safetensors_files import read_into
from megatron_trinity.errors import TrinityError, root_cause

TRACKER = "latest_checkpointed_iteration.txt"
OPTIMIZER_PREFIX = "optimizer."
MOMENTUM = ".expert_bias_momentum"


@dataclass(frozen=True)
class _Run:
    """Rows of a tensor that stand one behind the other in a chunk of a file."""

    row: int
    rows: int
    column: int
    chunk: ChunkStorageMetadata
    chunk_row: int

    @property
    def columns(self) -> int:
        return int(self.chunk.sizes[-1])


class TorchDistTensors:
    """The model's tensors in the directory of one iteration.

    Attributes:
        path: the directory.
        has_momentum: whether it holds SMEBU's momentum, which is state of training alone.
    """

    def __init__(self, path: Path) -> None:
        """Read what is where.

        Raises:
            TrinityError: it cannot be read.
        """
        self.path = path
        try:
            metadata = read_metadata(path)
        except READ_ERRORS as error:
            raise unreadable(path, error) from error
        tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(OPTIMIZER_PREFIX)
        }
        self.has_momentum = any(key.endswith(MOMENTUM) for key in tensors)
        self._stored = {key: tensors[key] for key in tensors if not key.endswith(MOMENTUM)}
        self._places = metadata.storage_data
        self._runs: dict[str, list[_Run]] = {}

    def model_keys(self) -> list[str]:
        """Canonical names of the model's tensors, sorted."""
        return sorted(self._stored)

    def shape(self, key: str) -> Shape:
        """Shape of a whole tensor."""
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """Type of a tensor's values."""
        return self._entry(key).properties.dtype

    def tensor(self, key: str) -> Tensor:
        """Read one whole tensor.

        Raises:
            TrinityError: there is no such tensor, or its file cannot be read.
        """
        shape = self.shape(key)
        return self.rows(key, 0, row_count(shape)).reshape(shape)

    def rows(self, key: str, row: int, rows: int) -> Tensor:
        """Read `[rows, width]` of a tensor, with rows counted over all axes but the last.

        Whatever the layout that wrote it, no more than twice as much is held in memory.

        Raises:
            TrinityError: there is no such tensor, its file cannot be read, or none holds the rows.
        """
        entry = self._entry(key)
        values = torch.empty(rows, entry.size[-1], dtype=entry.properties.dtype)
        try:
            found = sum(
                self._read_run(key, run, row, values) for run in self._overlap(key, row, rows)
            )
        except READ_ERRORS as error:
            raise TrinityError(f"{self.path}: {key} cannot be read: {root_cause(error)}") from error
        if found != values.numel():
            raise TrinityError(
                f"{self.path}: {found} of {values.numel()} values of {key} are there"
            )
        return values

    @functools.cached_property
    def _without_values(self) -> Any:
        from torch._subclasses.fake_tensor import FakeTensorMode  # slow, and training reads nothing

        return FakeTensorMode()

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self._stored:
            raise TrinityError(f"{self.path} has no tensor {key}")
        return self._stored[key]

    def _overlap(self, key: str, row: int, rows: int) -> Iterator[_Run]:
        if key not in self._runs:
            self._runs[key] = sorted(
                (run for chunk in self._stored[key].chunks for run in self._cut(key, chunk)),
                key=lambda run: run.row,
            )
        runs = self._runs[key]
        longest = max((run.rows for run in runs), default=0)
        for run in runs[bisect_left(runs, row - longest, key=lambda run: run.row) :]:
            if run.row >= row + rows:
                break
            if run.row + run.rows > row:
                yield run

    def _cut(self, key: str, chunk: ChunkStorageMetadata) -> Iterator[_Run]:
        """A chunk is a box; its rows lie together within each of the leading axes."""
        shape = self._stored[key].size
        if len(shape) == 1:
            yield _Run(0, 1, chunk.offsets[0], chunk, 0)
            return
        first, height = chunk.offsets[-2], chunk.sizes[-2]
        for number in range(math.prod(chunk.sizes[:-2])):
            before = chunk.offsets[0] + number if len(shape) == 3 else 0
            yield _Run(
                before * shape[-2] + first, height, chunk.offsets[-1], chunk, number * height
            )

    def _read_run(self, key: str, run: _Run, row: int, values: Tensor) -> int:
        """Fill what `run` has of `values`, the rows from `row`; returns how many values that is."""
        begin, end = max(run.row, row), min(run.row + run.rows, row + len(values))
        target = values[begin - row : end - row, run.column : run.column + run.columns]
        whole_rows = target.is_contiguous()
        read = target if whole_rows else torch.empty_like(target)
        place = self._places[MetadataIndex(key, run.chunk.offsets)]
        if place.transform_descriptors:
            raise ValueError(f"{place.relative_path} is written with an extension")
        with open(self.path / place.relative_path, "rb") as stream:
            view = cast(IO[bytes], _create_file_view(stream, place.offset, place.length))
            # Without its values, but with where they are: they need not all be read.
            with self._without_values:
                stored = torch.load(view, weights_only=True)
            if tuple(stored.shape) != tuple(run.chunk.sizes) or stored.dtype != values.dtype:
                raise ValueError(f"{place.relative_path} has another tensor in its place")
            if not stored.is_contiguous():
                raise ValueError(f"{place.relative_path} has it transposed")
            skipped = (run.chunk_row + begin - run.row) * run.columns + stored.storage_offset()
            offset = place.offset + stored.untyped_storage()._checkpoint_offset
            read_into(stream.fileno(), offset + skipped * values.itemsize, read)
        if not whole_rows:
            target.copy_(read)
        return target.numel()


class TorchDistCheckpoint(TorchDistTensors):
    """One iteration of a checkpoint directory.

    Attributes:
        args: the arguments that the run had.
        iteration: optimizer steps that the run had taken.
    """

    def __init__(self, directory: Path | str) -> None:
        """Open the newest iteration of `directory`, or `directory` itself if it is an iteration.

        Raises:
            TrinityError: there is no checkpoint of a Trinity model, or it cannot be read.
        """
        super().__init__(find_iteration(Path(directory)))
        try:
            with warnings.catch_warnings():
                # One process is what is wanted here.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                common = read_common_state(self.path)
        except READ_ERRORS as error:
            raise unreadable(self.path, error) from error
        self.args: Namespace = common["args"]
        self.iteration: int = common["iteration"]
        if not hasattr(self.args, "num_dense_layers"):
            raise TrinityError(f"{self.path} is a checkpoint of another model, not of Trinity")


def unreadable(path: Path, error: BaseException) -> TrinityError:
    """The error for a directory that cannot be read as a checkpoint."""
    return TrinityError(f"{path} cannot be read as a checkpoint: {root_cause(error)}")


def find_iteration(directory: Path) -> Path:
    """The directory of the newest iteration that the pointer file of `directory` names.

    Raises:
        TrinityError: there is none.
    """
    if (directory / ".metadata").is_file():
        return directory
    try:
        name = (directory / TRACKER).read_text().strip()
    except OSError as error:
        raise TrinityError(f"{directory} holds no checkpoint: {TRACKER} is not there") from error
    iteration = directory / (f"iter_{int(name):07d}" if name.isdigit() else name)
    if not (iteration / ".metadata").is_file():
        raise TrinityError(f"{directory / TRACKER} names {name}, but {iteration} is not whole")
    return iteration
