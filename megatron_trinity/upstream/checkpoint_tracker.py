"""The pointer to the newest checkpoint moves in one step."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="checkpoint-tracker",
    symbols=("megatron.training.checkpointing.maybe_msc",),
    reason=(
        "Megatron opens `latest_checkpointed_iteration.txt` for writing, which empties it, and "
        "then writes: on a full disk, or if the process ends in between, no checkpoint can be "
        "loaded any more. And it calls nothing between the last file of a checkpoint and its "
        "pointer"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="Megatron writes a new file and renames it, and takes callbacks around that",
)


TRACKER = "latest_checkpointed_iteration.txt"

OnIteration = Callable[[Path], None]
_before: OnIteration | None = None
_after: OnIteration | None = None


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Write a text file so that `path` has either its old content or the whole new one."""
    beside = path.with_name(f".{path.name}.new")
    try:
        with open(beside, "w", encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
        sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the disk keep a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def iteration_path(directory: Path, pointer: str) -> Path:
    """The directory of the iteration that a pointer's content names."""
    name = pointer.strip()
    return directory / (f"iter_{int(name):07d}" if name.isdecimal() else name)


def named_by(pointer: Path) -> Path:
    """The directory of the iteration that a pointer names, there or not.

    Raises:
        OSError, ValueError: the pointer cannot be read.
    """
    return iteration_path(pointer.parent, pointer.read_text())


def call_around_pointer(before: OnIteration, after: OnIteration) -> None:
    """Call these with the directory of the iteration, before and after a pointer moves to it."""
    global _before, _after
    _before, _after = before, after


@contextmanager
def _moving(pointer: Path) -> Iterator[TextIO]:
    content = io.StringIO()
    yield content
    iteration = iteration_path(pointer.parent, content.getvalue())
    if _before is not None:
        _before(iteration)
    with replacing(pointer) as stream:
        stream.write(content.getvalue())
    if _after is not None:
        _after(iteration)


class _Storage:
    """Megatron's storage functions, but for how the pointer is written."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def open(self, path: str, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "w" and os.path.basename(path) == TRACKER:
            return _moving(Path(path))
        return self._original.open(path, mode, *args, **kwargs)


def install() -> None:
    """Put the storage functions of `megatron.training.checkpointing` behind `_Storage`."""
    from megatron.training import checkpointing

    checkpointing.maybe_msc = _Storage(checkpointing.maybe_msc)
