"""The manifest of a checkpoint's directory: which files it consists of, their sizes and checksums.

It is written when all other files are on the disk, so a directory without one is not whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from megatron_trinity.errors import TrinityError
from megatron_trinity.file_sums import FileSum, file_sum
from megatron_trinity.upstream.checkpoint_tracker import replacing, sync

MANIFEST = "manifest.json"
VERSION = 1


def write_manifest(directory: Path, known: Mapping[str, FileSum] = {}) -> None:
    """Declare the files of `directory` complete, in one step.

    Args:
        known: sums of files that need not be read again, by their path inside of it; the disk has
            these files.

    Raises:
        OSError: a file cannot be read, or the manifest not be written.
    """
    # Nor is what an interrupted attempt has left of the manifest.
    paths = (path for path in directory.rglob("*") if path.is_file() and MANIFEST not in path.name)
    names = sorted(str(path.relative_to(directory)) for path in paths)
    for name in names:
        if name not in known:
            sync(directory / name)
    for folder in {(directory / name).parent for name in names}:
        sync(folder)
    files = {name: asdict(known.get(name) or file_sum(directory / name)) for name in names}
    with replacing(directory / MANIFEST) as stream:
        json.dump({"version": VERSION, "files": files}, stream, indent=1)


def read_manifest(directory: Path) -> dict[str, FileSum]:
    """The files of a checkpoint.

    Raises:
        TrinityError: there is no manifest, or it is none.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            raise TrinityError(f"{path} is of version {content['version']}, this reads {VERSION}")
        return {str(name): FileSum(**entry) for name, entry in content["files"].items()}
    except FileNotFoundError as error:
        raise TrinityError(f"{directory} has no {MANIFEST}: it was not saved to the end") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrinityError(f"{path} cannot be read: {error}") from error


def faults(directory: Path, files: Mapping[str, FileSum], checksums: bool) -> Iterator[str]:
    """What is wrong with files of a checkpoint, a line each.

    Args:
        files: those to look at, with what the manifest says of them.
        checksums: read them through; else only their sizes are compared.
    """
    for name, expected in files.items():
        path = directory / name
        try:
            size = path.stat().st_size
            if size != expected.bytes:
                yield f"{name} has {size} bytes in place of {expected.bytes}"
            elif checksums and file_sum(path) != expected:
                yield f"{name} has another content than was saved: its checksum differs"
        except FileNotFoundError:
            yield f"{name} is missing"
        except OSError as error:
            yield f"{name} cannot be read: {error}"


def strangers(directory: Path, files: Mapping[str, FileSum]) -> Iterator[str]:
    """Files that were not saved with a checkpoint, a line each; hidden ones do not matter.

    Megatron looks for some names, and would read what was put there.
    """
    known = {Path(name).parts[0] for name in files}
    for path in sorted(directory.iterdir()):
        if path.name not in known and path.name != MANIFEST and not path.name.startswith("."):
            yield f"{path.name} was not saved with it"
