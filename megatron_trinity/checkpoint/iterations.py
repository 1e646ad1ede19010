"""The directories of iterations in a run's directory, and which one a reader takes."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_trinity.checkpoint.hf.directory import hugging_face_hint
from megatron_trinity.checkpoint.whole.manifest import MANIFEST
from megatron_trinity.errors import TrinityError
from megatron_trinity.upstream.checkpoint_tracker import TRACKER, named_by

METADATA, CONFIG = ".metadata", "metadata.json"
RELEASE = "release"
"""Megatron's name for weights that no run has trained: it loads no optimizer with them."""

_NAME = re.compile(r"iter_\d{7,}|release")
SAVING = ".saving"


def number_of(iteration: Path) -> int:
    """The number in the name of an iteration's directory; 0 of `release`."""
    return 0 if iteration.name == RELEASE else int(iteration.name.removeprefix("iter_"))


def iterations(directory: Path) -> list[Path]:
    """Directories of iterations, newest first, whole or not; `release` comes last.

    Raises:
        TrinityError: the directory cannot be read.
    """
    try:
        paths = list(directory.iterdir()) if directory.is_dir() else []
        found = [path for path in paths if is_named(path) and path.is_dir()]
    except OSError as error:
        raise TrinityError(f"{directory} cannot be read: {error}") from error
    return sorted(found, key=lambda path: (path.name != RELEASE, number_of(path)), reverse=True)


def is_named(path: Path) -> bool:
    """Whether a path has the name of an iteration's directory."""
    return _NAME.fullmatch(path.name) is not None


def has_manifest(path: Path) -> bool:
    """Whether an iteration was saved to the end."""
    return (path / MANIFEST).is_file()


def mark_interrupted(path: Path) -> None:
    """Have an iteration count as interrupted until it has a manifest.

    Raises:
        OSError: the mark cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _mark(path).touch()


def is_interrupted(path: Path) -> bool:
    """Whether training has begun to save an iteration, and has not saved it to the end."""
    return _mark(path).exists() and not has_manifest(path)


def _mark(path: Path) -> Path:
    return path.with_name(f".{path.name}{SAVING}")


def newest_saved(directory: Path) -> Path | None:
    """The newest iteration that was saved to the end, whatever the pointer names.

    A run that is killed between its last manifest and its pointer leaves one that lags.

    Raises:
        TrinityError: the directory cannot be read.
    """
    return next(filter(has_manifest, iterations(directory)), None)


def find_iteration(directory: Path) -> Path:
    """`directory` itself if it is one iteration, else the newest in it that was saved to the end.

    Where none has a manifest, another program has saved them all, and its pointer says which.

    Raises:
        TrinityError: there is none.
    """
    if (directory / METADATA).is_file():
        return directory
    if (saved := newest_saved(directory)) is not None:
        iteration, named = saved, f"{saved} is the newest that was saved"
    else:
        iteration = _pointed_at(directory)
        named = f"{directory / TRACKER} names {iteration.name}"
    if not (iteration / METADATA).is_file():
        raise TrinityError(
            f"{named}, which has no {METADATA}: it is not whole, or not in torch_dist; name the "
            "directory of another iteration"
        )
    return iteration


def _pointed_at(directory: Path) -> Path:
    try:
        return named_by(directory / TRACKER)
    except FileNotFoundError as error:
        hint = hugging_face_hint(directory)
        raise TrinityError(
            hint or f"{directory} holds no checkpoint: {TRACKER} is not there"
        ) from error
    except (OSError, ValueError) as error:
        raise TrinityError(f"{directory / TRACKER} cannot be read: {error}") from error
