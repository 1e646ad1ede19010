"""Reading a Megatron `torch_dist` checkpoint by rows, without its model and on one process."""

from __future__ import annotations

import functools
import io
import math
from argparse import Namespace
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_trinity.checkpoint.conversion.rows import Shape, row_count
from megatron_trinity.checkpoint.conversion.tensor_bytes import read_into
from megatron_trinity.checkpoint.iterations import CONFIG, METADATA, find_iteration
from megatron_trinity.errors import TrinityError, root_cause
from megatron_trinity.model.architecture import FIXED
from megatron_trinity.upstream.checkpoint_pickles import load_metadata, load_object

OPTIMIZER_PREFIX = "optimizer."
MOMENTUM = ".expert_bias_momentum"
COMMON = "common_state/shard_0_1"
"""Key of what all ranks have alike: arguments, iteration, schedule."""
READ_ERRORS = (Exception, CheckpointException)
"""Many kinds, from torch, pickle and the file system; torch's own is no subclass of Exception."""


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
    """The tensors, and the objects, in the directory of one iteration.

    Attributes:
        path: the directory.
        has_momentum: whether it holds SMEBU's momentum, which is state of training alone.
        has_optimizer: whether it holds state of an optimizer.
        places: file, offset and length of every chunk of a tensor and of every object.
    """

    def __init__(self, path: Path) -> None:
        """Read what is where.

        Raises:
            TrinityError: it cannot be read.
        """
        self.path = path
        try:
            with open(path / METADATA, "rb") as stream:
                metadata = load_metadata(stream)
            entries = metadata.state_dict_metadata.items()
            self.places: dict[MetadataIndex, Any] = metadata.storage_data
        except READ_ERRORS as error:
            raise unreadable(path, error) from error
        self._stored = {
            k: entry for k, entry in entries if isinstance(entry, TensorStorageMetadata)
        }
        self._objects = [k for k, entry in entries if isinstance(entry, BytesStorageMetadata)]
        self.has_optimizer = any(key.startswith(OPTIMIZER_PREFIX) for key in self._stored)
        self.has_momentum = any(key.endswith(MOMENTUM) for key in self.model_state_keys())
        self._runs: dict[str, list[_Run]] = {}
        self._begins: dict[MetadataIndex, int] = {}

    def tensor_keys(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._stored)

    def model_state_keys(self) -> list[str]:
        """Names of the tensors that are no state of the optimizer, sorted."""
        return [key for key in self.tensor_keys() if not key.startswith(OPTIMIZER_PREFIX)]

    def model_keys(self) -> list[str]:
        """Canonical names of the model's tensors, sorted."""
        return [key for key in self.model_state_keys() if not key.endswith(MOMENTUM)]

    def object_keys(self) -> list[str]:
        """Names of the objects that are no tensors, sorted."""
        return sorted(self._objects)

    def object(self, key: str) -> Any:
        """Read an object that is no tensor.

        Raises:
            TrinityError: there is none, it cannot be read, or it is more than data.
        """
        content = self.object_bytes(key)
        try:
            return load_object(io.BytesIO(content))
        except READ_ERRORS as error:
            raise TrinityError(f"{self.path}: {key} cannot be read: {root_cause(error)}") from error

    def object_bytes(self, key: str) -> bytes:
        """The object in the form that it is stored in.

        Raises:
            TrinityError: there is none, or its file cannot be read.
        """
        try:
            place = self.places[MetadataIndex(key)]
            _refuse_extension(place)
            with open(self.path / place.relative_path, "rb") as stream:
                stream.seek(place.offset)
                return stream.read(place.length)
        except READ_ERRORS as error:
            raise TrinityError(f"{self.path}: {key} cannot be read: {root_cause(error)}") from error

    def chunks(self, key: str) -> list[ChunkStorageMetadata]:
        """The boxes that a tensor is stored in."""
        return list(self._entry(key).chunks)

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
        index = MetadataIndex(key, run.chunk.offsets)
        with open(self.path / self.places[index].relative_path, "rb") as stream:
            if index not in self._begins:
                self._begins[index] = self._begin(stream, index, run.chunk, values.dtype)
            skipped = (run.chunk_row + begin - run.row) * run.columns * values.itemsize
            read_into(stream.fileno(), self._begins[index] + skipped, read)
        if not whole_rows:
            target.copy_(read)
        return target.numel()

    def _begin(
        self,
        stream: io.BufferedReader,
        index: MetadataIndex,
        chunk: ChunkStorageMetadata,
        dtype: Any,
    ) -> int:
        """Where in its file the values of a chunk begin."""
        place = self.places[index]
        _refuse_extension(place)
        view = cast(IO[bytes], _create_file_view(stream, place.offset, place.length))
        # Without its values, but with where they are: they need not all be read.
        with self._without_values:
            stored = torch.load(view, weights_only=True)
        if tuple(stored.shape) != tuple(chunk.sizes) or stored.dtype != dtype:
            raise ValueError(f"{place.relative_path} has another tensor in its place")
        if not stored.is_contiguous():
            raise ValueError(f"{place.relative_path} has it transposed")
        offset = int(place.offset + stored.untyped_storage()._checkpoint_offset)
        return offset + stored.storage_offset() * stored.itemsize


@functools.cache
def tensors_of(iteration: Path) -> TorchDistTensors:
    """The tensors of a directory, opened once in a process that reads them for many jobs."""
    return TorchDistTensors(iteration)


class TorchDistCheckpoint(TorchDistTensors):
    """One iteration of a checkpoint directory.

    Attributes:
        args: the arguments that the run had.
        iteration: optimizer steps that the run had taken.
        common: what Megatron saves beside tensors, those two among it.
    """

    def __init__(self, directory: Path | str) -> None:
        """Open the newest iteration of `directory`, or `directory` itself if it is an iteration.

        Raises:
            TrinityError: there is no checkpoint of a Trinity model, or it cannot be read.
        """
        super().__init__(find_iteration(Path(directory)))
        if not (self.path / CONFIG).is_file():
            raise TrinityError(f"{self.path} is no checkpoint that Megatron loads: no {CONFIG}")
        self.common: dict[str, Any] = self._read_common()
        try:
            self.args: Namespace = self.common["args"]
            self.iteration: int = self.common["iteration"]
        except READ_ERRORS as error:
            raise unreadable(self.path, error) from error
        refuse_other_models(self.path, self.args)

    def _read_common(self) -> Any:
        legacy = self.path / "common.pt"  # of older versions of megatron-core
        if not legacy.is_file():
            return self.object(COMMON)[0]
        try:
            return load_object(legacy)
        except READ_ERRORS as error:
            raise TrinityError(f"{legacy} cannot be read: {root_cause(error)}") from error


def _refuse_extension(place: Any) -> None:
    if place.transform_descriptors:
        raise ValueError(f"{place.relative_path} is written with an extension")


def unreadable(path: Path, error: BaseException) -> TrinityError:
    """The error for a directory that cannot be read as a checkpoint."""
    return TrinityError(f"{path} cannot be read as a checkpoint: {root_cause(error)}")


def refuse_other_models(path: Path, args: Namespace) -> None:
    """Refuse what a run of another model than Trinity has saved, going by its arguments.

    Raises:
        TrinityError: it is one; names an argument that no Trinity model has.
    """
    if not hasattr(args, "num_dense_layers"):
        raise TrinityError(f"{path} is a checkpoint of another model, not of Trinity")
    for name, value in FIXED.items():
        found = getattr(args, name, value)
        if found != value:
            raise TrinityError(
                f"{path} is a checkpoint of another model, not of Trinity: it was trained with "
                f"{name} {found}, and AfMoE has {value}"
            )
