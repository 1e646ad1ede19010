"""Writing a Megatron `torch_dist` checkpoint file by file, without a model and from any process.

torch's own writer makes the files and their `.metadata`. It keeps what it has written in memory
until a file is done, so files are small.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_trinity.checkpoint.conversion.rows import Shape
from megatron_trinity.checkpoint.conversion.slices import Slice
from megatron_trinity.checkpoint.whole.manifest import write_manifest
from megatron_trinity.errors import root_cause
from megatron_trinity.upstream.checkpoint_sums import summed, sums_of
from megatron_trinity.upstream.checkpoint_tracker import replacing, sync

Resolve = Callable[[WriteItem], Tensor | io.BytesIO]


@dataclass(frozen=True)
class TensorSlice:
    """A slice of a tensor that is to be written.

    Attributes:
        key: canonical name of the tensor.
        shape: of the whole tensor.
        part: the slice.
    """

    key: str
    shape: Shape
    dtype: torch.dtype
    part: Slice

    @property
    def nbytes(self) -> int:
        return self.part.rows * self.shape[-1] * self.dtype.itemsize

    def write_item(self) -> WriteItem:
        """What torch's writer is told of it."""
        offsets, sizes = (torch.Size(numbers) for numbers in self.part.box(self.shape))
        return WriteItem(
            index=MetadataIndex(self.key, offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
                properties=TensorProperties(dtype=self.dtype),
                size=torch.Size(self.shape),
            ),
        )


class _Planner(DefaultSavePlanner):
    """Makes what is written when it is written."""

    def __init__(self, resolve: Resolve) -> None:
        super().__init__()
        self._resolve = resolve

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._resolve(write_item)


def write_file(directory: Path, plan: SavePlan, resolve: Resolve) -> list[WriteResult]:
    """Write the file of one plan of `plan_files`; returns what `finish` takes.

    The disk may not have it yet: `keep` sees to that, while this process goes on.

    Raises:
        OSError: it could not be written.
    """
    try:
        results: list[WriteResult] = _writer(directory).write_data(plan, _Planner(resolve)).wait()
    except RuntimeError as error:  # of torch's writer, when the disk is full
        raise OSError(root_cause(error)) from error
    return summed(results, directory)


def keep(directory: Path, results: list[WriteResult]) -> None:
    """Wait until the disk has a file; its results are those of `write_file`."""
    for name in sums_of([results]):
        sync(directory / name)


def plan_files(directory: Path, files: Iterable[Iterable[WriteItem]]) -> tuple[list[SavePlan], Any]:
    """Plans of files, each with the items that it gets, and the metadata of all."""
    plans, metadata = create_default_global_save_plan([SavePlan(list(items)) for items in files])
    return _writer(directory).prepare_global_plan(plans), metadata


def finish(directory: Path, metadata: Any, results: list[list[WriteResult]]) -> None:
    """Write what makes the files a checkpoint that Megatron loads, its manifest last.

    Args:
        metadata: of `plan_files`.
        results: of `write_file`, for every file.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    for of_file in results:
        keep(directory, of_file)
    _writer(directory).finish(metadata, results)
    save_config(CheckpointingConfig("torch_dist"), str(directory))
    write_manifest(directory, sums_of(results))


def object_items(
    objects: Mapping[str, Any], stored: Mapping[str, bytes] = {}
) -> tuple[list[WriteItem], Resolve]:
    """Objects that are no tensors, by their keys, as Megatron stores them.

    Args:
        stored: objects that are in that form already.
    """
    keys = (*objects, *stored)
    items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in keys]

    def resolve(item: WriteItem) -> io.BytesIO:
        key = item.index.fqn
        stream = io.BytesIO(stored.get(key, b""))
        if key in objects:
            torch.save([objects[key]], stream)
        return stream

    return items, resolve


def move_into_place(directory: Path, target: Path, replaced: Path, pointer: Path) -> None:
    """Make a whole directory a checkpoint's iteration, and let its pointer file name it, last.

    Args:
        replaced: where what stood at `target` goes.
        pointer: the file that names the newest iteration.
    """
    if target.exists():
        target.rename(replaced)
    directory.rename(target)
    with replacing(pointer) as stream:
        number = target.name.removeprefix("iter_")
        stream.write(str(int(number)) if number.isdigit() else target.name)


def _writer(directory: Path) -> FileSystemWriter:
    return FileSystemWriter(directory, sync_files=False)
