"""The pointer to the newest checkpoint moves in one step.

Reason: Megatron opens `latest_checkpointed_iteration.txt` for writing, which empties it, and then
writes: on a full disk, or if the process ends in between, no checkpoint can be loaded any more.
Written for: megatron-core 0.19.2.
Remove when: it writes a new file and renames it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

TRACKER = "latest_checkpointed_iteration.txt"


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Write a text file so that `path` has either its old content or the whole new one."""
    beside = path.with_name(f".{path.name}.new")
    try:
        with open(beside, "w") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class _Storage:
    """Megatron's storage functions, but for how the pointer is written."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def open(self, path: str, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "w" and os.path.basename(path) == TRACKER:
            return replacing(Path(path))
        return self._original.open(path, mode, *args, **kwargs)


def install() -> None:
    """Put the storage functions of `megatron.training.checkpointing` behind `_Storage`."""
    from megatron.training import checkpointing

    checkpointing.maybe_msc = _Storage(checkpointing.maybe_msc)
