"""Reading what a checkpoint has pickled, without running anything that it names.

torch's reader unpickles `.metadata` and objects with no limit, and a pickle can name any function.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

READ_ERRORS = (Exception, CheckpointException)
"""Many kinds, from torch, pickle and the file system; torch's own is no subclass of Exception."""

_MODULES = (
    "megatron.core.dist_checkpointing.strategies.torch",  # stand-ins for classes of old checkpoints
    "pathlib",
    "pathlib._local",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
)
"""Whose classes `.metadata` is made of."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = None
        if module in _MODULES and "." not in name:
            found = super().find_class(module, name)
            if not (isinstance(found, type) and found.__module__ == module):
                found = None
        elif (module, name) in (("torch", "Size"), ("torch.serialization", "_get_layout")):
            found = super().find_class(module, name)
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return found


class _SafeReader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))


class _SafePlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def read_metadata(iteration: Path) -> Metadata:
    """`.metadata` of an iteration.

    Raises:
        READ_ERRORS: it is something else, or cannot be read.
    """
    with open(iteration / ".metadata", "rb") as stream:
        metadata = _MetadataUnpickler(stream).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f".metadata is of type {type(metadata).__name__}")
    if metadata.storage_meta is None:
        metadata.storage_meta = StorageMeta()
    return metadata


def read_common_state(iteration: Path) -> dict[str, Any]:
    """What all ranks have saved alike: arguments, iteration, schedule.

    Raises:
        READ_ERRORS: it is something else, or cannot be read.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    if (iteration / "common.pt").is_file():  # of earlier versions
        common: dict[str, Any] = torch.load(iteration / "common.pt", weights_only=True)
        return common
    key = ShardedObject("common_state", None, (1,), (0,)).unique_key
    state: dict[str, Any] = {key: io.BytesIO()}
    planner = _SafePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    load(state, storage_reader=_SafeReader(iteration), planner=planner, no_dist=True)
    found: dict[str, Any] = state[key][0]
    return found
