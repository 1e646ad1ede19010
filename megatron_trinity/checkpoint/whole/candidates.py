"""Which iterations of a directory of checkpoints there are, and which of them may be loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from megatron_trinity.checkpoint.iterations import (
    CONFIG,
    METADATA,
    RELEASE,
    SAVING,
    has_manifest,
    is_interrupted,
    is_named,
    iterations,
    number_of,
)
from megatron_trinity.checkpoint.rank_files.checkpoint import incomplete_rank_file, rank_files
from megatron_trinity.checkpoint.torch_dist.read import READ_ERRORS
from megatron_trinity.checkpoint.whole.manifest import MANIFEST, faults, read_manifest, strangers
from megatron_trinity.errors import TrinityError, root_cause
from megatron_trinity.upstream.checkpoint_pickles import load_metadata
from megatron_trinity.upstream.checkpoint_tracker import TRACKER, named_by

LAST_OF_MEGATRON = CONFIG
"""The last file that Megatron itself writes into an iteration."""

_DISCARDED = ".discarded"


def is_iteration(path: Path) -> bool:
    """Whether a directory is that of one iteration, and not of a run."""
    files = (METADATA, MANIFEST, LAST_OF_MEGATRON)
    found = any((path / name).is_file() for name in files) or bool(rank_files(path))
    return is_named(path) and found


def is_empty(directory: Path) -> bool:
    """Whether no checkpoint was ever saved to the end in a directory, nor put there."""
    return not (directory / TRACKER).exists() and all(map(is_interrupted, iterations(directory)))


def superfluous(directory: Path, last: int | None, every: int | None) -> list[Path]:
    """What is to be deleted after a save.

    Args:
        last: so many of the newest whole iterations are kept; None for 1.
        every: whole iterations that this divides are kept as well.

    Returns:
        Whole iterations that neither argument keeps, and interrupted ones that are older than the
        newest whole one. Never `release`, a symbolic link, or what another program has saved
        without a manifest.
    """
    found = [path for path in iterations(directory) if path.name != RELEASE]
    whole = [path for path in found if has_manifest(path)]
    kept = {path for path in whole if every and number_of(path) % every == 0}
    kept.update(whole[: last or 1])
    older = found[found.index(whole[0]) :] if whole else []
    return [
        path
        for path in older
        if path not in kept and not path.is_symlink() and (path in whole or is_interrupted(path))
    ]


def discard(path: Path) -> None:
    """Delete an iteration; interrupted anywhere, it is no candidate any more.

    Of a symbolic link the link alone goes.

    Raises:
        OSError: it cannot be deleted.
    """
    if path.is_symlink():
        path.unlink()
        return
    hidden = path.with_name(f".{path.name}{_DISCARDED}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def sweep(directory: Path) -> None:
    """Delete what interrupted deletions have left, and marks; while no save is in progress.

    Raises:
        OSError: it cannot be deleted.
    """
    for mark in directory.glob(f".iter_*{SAVING}"):
        iteration = mark.with_name(mark.name[1 : -len(SAVING)])
        if has_manifest(iteration) or not iteration.exists():
            mark.unlink()
    for path in directory.glob(f".iter_*{_DISCARDED}"):
        shutil.rmtree(path)


def examine(directory: Path, step: int | None) -> Iterator[tuple[Path, str | None]]:
    """The iterations that a run may load, in the order in which it would rather have them.

    Args:
        step: this iteration alone; else all, newest first, whatever the pointer names.

    Yields:
        an iteration, and what is wrong with it as far as names and sizes of its files say, or None.
        One without a manifest was not saved to the end, unless training has not written it.
    """
    if step is not None:
        path = directory / f"iter_{step:07d}"
        yield path, _fault(path, asked_for=True)
        return
    pointer = directory / TRACKER
    if pointer.is_file() and (fault := _pointer_fault(pointer)) is not None:
        yield pointer, fault
    for path in iterations(directory):
        yield path, _fault(path, asked_for=path.name == RELEASE)


def _pointer_fault(pointer: Path) -> str | None:
    try:
        named = named_by(pointer)
    except (OSError, ValueError) as error:
        return f"it cannot be read: {error}"
    if not is_named(named):
        return "it names no iteration"
    return None if named.is_dir() else f"it names {named.name}, which is not there"


def _fault(path: Path, asked_for: bool) -> str | None:
    if not path.is_dir():
        return "it is not there"
    if is_interrupted(path):
        return "its save was interrupted"
    if asked_for and not has_manifest(path):
        return _incomplete(path)
    try:
        files = read_manifest(path)
        return next(chain(strangers(path, files), faults(path, files, checksums=False)), None)
    except (OSError, TrinityError) as error:
        return str(error).removeprefix(f"{path} ")


def _incomplete(path: Path) -> str | None:
    """What of a checkpoint without a manifest is missing, as far as its own files say."""
    if rank_files(path):
        return incomplete_rank_file(path)
    try:
        needed: dict[str, int] = {LAST_OF_MEGATRON: 0}
        with open(path / METADATA, "rb") as stream:
            places = load_metadata(stream).storage_data
        for place in places.values():
            end = place.offset + place.length
            needed[place.relative_path] = max(needed.get(place.relative_path, 0), end)
        for name, size in needed.items():
            found = (path / name).stat().st_size
            if found < size:
                return f"{name} has {found} bytes, {size} are needed"
    except READ_ERRORS as error:
        return root_cause(error)
    return None
