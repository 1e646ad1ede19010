"""Safetensors files by rows: what stands where in a file, and files written from anywhere.

The library maps whole files into memory and writes from whole tensors; conversions read and write
rows, with little memory (`conversion.tensor_bytes`). It still judges every header.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_trinity.checkpoint.conversion.rows import Shape
from megatron_trinity.errors import TrinityError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Types of values that a model is converted from, by their names in a file."""

_NAMES = {torch.float8_e4m3fn: "F8_E4M3", **{dtype: name for name, dtype in DTYPES.items()}}
_LENGTH = struct.Struct("<Q")  # of the header, in front of it


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: the file.
        offset: where its values begin, bytes from the start of the file.
        dtype: its type, by the format's name.
        shape: its shape.
    """

    file: Path
    offset: int
    dtype: str
    shape: Shape


def parse_json(path: Path) -> Any:
    """The content of a JSON file, in which no key may stand twice.

    Raises:
        TrinityError: it cannot be read, is not JSON, or a key stands twice.
    """
    try:
        return _without_repetition(path.read_bytes(), str(path))
    except OSError as error:
        raise TrinityError(f"{path} cannot be read: {error.strerror}") from error


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Name to place of every tensor in a file.

    Raises:
        TrinityError: the file is not whole, or is no safetensors file.
    """
    try:
        with safe_open(path, "pt"):
            pass  # the library checks that the header fits the file, with no byte left over
        with open(path, "rb") as stream:
            (length,) = _LENGTH.unpack(stream.read(_LENGTH.size))
            header = _without_repetition(stream.read(length), str(path))
    except (SafetensorError, OSError) as error:
        raise TrinityError(f"{path} is not whole or no safetensors file: {error}") from error
    data = _LENGTH.size + length
    return {
        name: StoredTensor(
            path, data + said["data_offsets"][0], said["dtype"], tuple(said["shape"])
        )
        for name, said in header.items()
        if name != "__metadata__"
    }


@dataclass(frozen=True)
class FileLayout:
    """A file to be written: its header, where each tensor's values begin, and bytes in all."""

    header: bytes
    offsets: dict[str, int]
    size: int


def lay_out(tensors: Iterable[tuple[str, torch.dtype, Shape]]) -> FileLayout:
    """Place tensors one behind the other in a file."""
    said: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        said[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = _LENGTH.size + len(text)
    offsets = {n: data + s["data_offsets"][0] for n, s in said.items() if n != "__metadata__"}
    return FileLayout(_LENGTH.pack(len(text)) + text, offsets, data + end)


def _without_repetition(text: bytes, where: str) -> Any:
    def refuse_repetition(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                raise TrinityError(f"{where} names {key} twice")
            content[key] = value
        return content

    try:
        return json.loads(text, object_pairs_hook=refuse_repetition)
    except ValueError as error:
        raise TrinityError(f"{where} is not JSON: {error}") from error
