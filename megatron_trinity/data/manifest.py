"""Outputs that appear whole or not at all, and the manifest that says what they were made from.

Files are written into a hidden directory next to their place, then renamed. The manifest is removed
first and renamed into place last: where it stands, all that it describes stands too.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_trinity.errors import TrinityError


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest at `path`, or None where there is none that can be read."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def refuse_existing(outputs: Iterable[Path], why: str) -> None:
    """Refuse to write over any of `outputs`.

    Raises:
        TrinityError: one exists; the message names it and ends with `why`.
    """
    present = [str(path) for path in outputs if path.exists()]
    if present:
        more = f" (and {len(present) - 1} more)" if len(present) > 1 else ""
        raise TrinityError(
            f"{present[0]}{more} is there already and {why}: pass --overwrite to replace it"
        )


@contextmanager
def held_directory(path: Path, busy: str) -> Iterator[None]:
    """Make `path`, and keep other processes out of it meanwhile.

    Raises:
        TrinityError: it cannot be made, or another process has it: `busy`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        directory = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise TrinityError(f"cannot write into {path.parent}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrinityError(busy) from error
        yield
    finally:
        os.close(directory)


@contextmanager
def staging_directory(parent: Path, name: str) -> Iterator[Path]:
    """A hidden directory inside `parent` that is gone afterwards, whatever happened.

    What a killed process has left in it is removed.

    Raises:
        TrinityError: `parent` cannot be made or written to, or another process has it.
    """
    staging = parent / f".{name}.part"
    with held_directory(staging, f"another process writes into {parent}: wait for it"):
        try:
            for left in staging.iterdir():
                left.unlink()
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def publish(
    staged: Mapping[Path, Path],
    manifest: Mapping[str, Any],
    manifest_path: Path,
    staging: Path,
    stale: Iterable[Path] = (),
) -> None:
    """Move `staged` (from -> to) into place, with the manifest last.

    `stale` are outputs of an earlier run that this one does not make; they are removed.
    """
    staged_manifest = staging / "manifest"
    text = json.dumps(manifest, indent=2, allow_nan=False)
    staged_manifest.write_text(text + "\n", encoding="utf-8")
    for source in [*staged, staged_manifest]:
        flush_to_disk(source)
    manifest_path.unlink(missing_ok=True)
    for path in stale:
        path.unlink(missing_ok=True)
    for source, target in staged.items():
        os.replace(source, target)
    os.replace(staged_manifest, manifest_path)
    flush_to_disk(manifest_path.parent)


def flush_to_disk(path: Path) -> None:
    """Put on the disk what a file, or a directory, has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def split_in_manifest(prefix: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The manifest beside a dataset, and what it says of this split; both empty where none is."""
    base, _, split = prefix.rpartition("_")
    manifest = read_manifest(Path(f"{base}.json")) or {}
    return manifest, manifest.get("splits", {}).get(split, {})
