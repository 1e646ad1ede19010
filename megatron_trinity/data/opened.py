"""Files opened as streams of bytes, decompressed; what is wrong with one, in a line."""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
import zlib
from typing import IO, cast

from megatron_trinity.data import remote
from megatron_trinity.data.documents import STANDARD_INPUT
from megatron_trinity.data.listing import SourceFile

UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading raises where a file is damaged, missing or not to be read."""

_LARGEST_WINDOW = 31  # log2; `zstd --long=31` writes it, and a reader has to ask for it


def open_bytes(file: SourceFile) -> IO[bytes]:
    """The file's content, decompressed.

    Raises:
        OSError: it cannot be opened.
    """
    assert file.format is not None
    raw = open_raw(file)
    compression = file.format.compression
    if compression == "gz":
        return cast(IO[bytes], gzip.open(raw))
    if compression == "bz2":
        return cast(IO[bytes], bz2.open(raw))
    if compression == "xz":
        return cast(IO[bytes], lzma.open(raw))
    return cast(IO[bytes], _Zstd(raw)) if compression == "zst" else raw


def open_raw(file: SourceFile) -> IO[bytes]:
    """The file's bytes as they are stored."""
    if file.path == STANDARD_INPUT:
        return sys.stdin.buffer
    if remote.is_remote(file.path):
        return remote.open_remote(file.path)
    return open(file.path, "rb")


def reason(error: BaseException) -> str:
    """What an error of `UNREADABLE` says."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())


class _Zstd:
    """A zstd stream whose errors are those of the other formats."""

    def __init__(self, raw: IO[bytes]) -> None:
        from backports import zstd

        self._error = zstd.ZstdError
        option = zstd.DecompressionParameter.window_log_max
        self._stream = zstd.ZstdFile(raw, options={option: _LARGEST_WINDOW})

    def read1(self, size: int) -> bytes:
        try:
            return self._stream.read1(size)
        except self._error as error:
            raise OSError(str(error)) from error

    def close(self) -> None:
        self._stream.close()


def read_at_most(file: SourceFile, size: int) -> bytes:
    """The first `size` bytes of a file's content."""
    stream = open_bytes(file)
    parts: list[bytes] = []
    left = size
    try:
        while left and (part := stream.read1(min(left, 1 << 20))):  # type: ignore[attr-defined]
            parts.append(part)
            left -= len(part)
    finally:
        if file.path != STANDARD_INPUT:
            stream.close()
    return b"".join(parts)


def is_local(file: SourceFile) -> bool:
    """Whether the file is one of this machine's file systems."""
    return file.path != STANDARD_INPUT and not remote.is_remote(file.path)
