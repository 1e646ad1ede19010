"""Size and checksum of a file, as the manifest of a checkpoint has them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileSum:
    """What a file must be.

    Attributes:
        bytes: its size.
        sha256: hexadecimal digest of its content, as `sha256sum` prints it.
    """

    bytes: int
    sha256: str


def file_sum(path: Path) -> FileSum:
    """Read a file through.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileSum(os.fstat(stream.fileno()).st_size, digest)
