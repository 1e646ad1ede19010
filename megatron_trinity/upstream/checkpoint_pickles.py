"""The pickles in a checkpoint are read as data: nothing that they name is executed."""

from __future__ import annotations

import functools
import io
import pickle
import re
from pathlib import Path, PosixPath
from typing import IO, Any

import torch

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="checkpoint-pickles",
    symbols=(
        "torch.distributed.checkpoint.filesystem.pickle",
        "torch.distributed.checkpoint.default_planner.DefaultLoadPlanner.load_bytes",
        "megatron.core.safe_globals.SAFE_GLOBALS",
    ),
    reason=(
        "torch reads `.metadata` with `pickle.load`, and objects with `weights_only=False`, so "
        "that loading a checkpoint would run whatever its maker put there"
    ),
    written_for="megatron-core 0.19.2, torch 2.13",
    remove_when="metadata and objects are read by restricted unpicklers",
)


_CHECKPOINT = "torch.distributed.checkpoint."
_ALLOWED: dict[str, frozenset[str]] = {
    f"{_CHECKPOINT}metadata": frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    f"{_CHECKPOINT}filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
    f"{_CHECKPOINT}planner": frozenset(
        {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"}
    ),
    "torch": frozenset(
        {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))}
    ),
    "torch.serialization": frozenset({"_get_layout"}),
    "collections": frozenset({"OrderedDict"}),
    "pathlib": frozenset({"PosixPath"}),
    "pathlib._local": frozenset({"PosixPath"}),  # where Python 3.13 alone has it
}
"""What the metadata of a checkpoint is made of: module to names. All of it is data."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What a pickle names, if it is allowed; a name with a dot in it never is."""
        if name not in _ALLOWED.get(module, ()):
            raise _refusal(f"{module}.{name}")
        if name == "PosixPath":
            return PosixPath
        return super().find_class(module, name)


def _refusal(names: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(
        f"a pickle in it names {names}, which no checkpoint consists of; nothing was executed"
    )


def load_metadata(stream: IO[bytes]) -> Any:
    """Read the content of a `.metadata` file.

    Raises:
        pickle.UnpicklingError: it names something else than what metadata is made of.
        Exception: it is damaged; of many kinds, as of `pickle.load`.
    """
    return _MetadataUnpickler(stream).load()


def load_object(source: IO[bytes] | Path, mmap: bool = False) -> Any:
    """Read what `torch.save` wrote: tensors, plain objects, and what megatron-core calls safe.

    Args:
        mmap: of a path: read tensors when they are used.

    Raises:
        pickle.UnpicklingError: it names something else.
        Exception: it is damaged; of many kinds, as of `torch.load`.
    """
    import megatron.core  # noqa: F401 - tells torch what it calls safe

    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
    # Outside of the handler: torch's own message is a page.
    raise _refusal(named[1]) if named else pickle.UnpicklingError("it is no data that torch reads")


class _Pickle:
    """The module `pickle`, but for how torch's reader of checkpoints loads metadata."""

    def __getattr__(self, name: str) -> Any:
        return getattr(pickle, name)

    @staticmethod
    def load(stream: IO[bytes]) -> Any:
        return load_metadata(stream)


def install() -> None:
    """Let torch's reader and planner, which Megatron's loader uses, read data alone."""
    from torch.distributed.checkpoint import default_planner, filesystem

    filesystem.pickle = _Pickle()  # type: ignore[assignment]
    planner = default_planner.DefaultLoadPlanner
    original = planner.load_bytes

    @functools.wraps(original)
    def load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
        load_object(value)  # raises for what the original would execute
        value.seek(0)
        original(self, read_item, value)

    planner.load_bytes = load_bytes  # type: ignore[method-assign]
