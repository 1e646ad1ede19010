"""Remote files by fsspec: s3://, gs://, https://, hf://datasets/OWNER/NAME and others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

from megatron_trinity.errors import TrinityError, UsageError, root_cause

_STAMPS = (
    "etag",
    "ETag",
    "mtime",
    "last_modified",
    "LastModified",
    "blob_id",
    "md5Hash",
    "created",
)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a remote source; `is_source` where it is the source itself."""

    url: str
    name: str
    size: int
    stamp: str
    is_source: bool


def is_remote(source: str) -> bool:
    """Whether `source` is a URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)", source) is not None


def list_files(source: str) -> Iterator[RemoteFile]:
    """The files of `source`, a file or a directory, sorted by name.

    Raises:
        UsageError: its protocol is not known or needs a package, or it is not there.
        TrinityError: it cannot be reached.
    """
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(source)
        info = system.info(root)
        if info["type"] == "file":
            found = {root: info}
        else:
            found = system.find(root, detail=True)
    except FileNotFoundError as error:
        raise UsageError(f"source {source} is not there") from error
    except ImportError as error:
        raise UsageError(f"source {source} cannot be read: {root_cause(error)}") from error
    except ValueError as error:
        raise UsageError(f"source {source} is no URL that is known: {error}") from error
    except Exception as error:  # whatever a client of some service raises
        raise TrinityError(
            f"source {source} cannot be reached: {type(error).__name__}: {root_cause(error)[:200]}"
        ) from error
    for path in sorted(found):
        entry: dict[str, Any] = found[path]
        is_source = path == root
        name = path.rpartition("/")[2] if is_source else path[len(root.rstrip("/")) + 1 :]
        stamp = next((str(entry[key]) for key in _STAMPS if entry.get(key) is not None), "")
        url = source if is_source else system.unstrip_protocol(path)
        yield RemoteFile(url, name, int(entry.get("size") or 0), stamp, is_source)


def open_remote(url: str) -> IO[bytes]:
    """Open a remote file.

    Raises:
        OSError: it cannot be read, for whatever reason its client has.
    """
    import fsspec

    try:
        return cast(IO[bytes], fsspec.open(url, "rb").open())
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {root_cause(error)[:200]}") from error
