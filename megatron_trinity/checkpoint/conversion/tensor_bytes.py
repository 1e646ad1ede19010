"""The bytes of a tensor, read from and written to any place of a file."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def read_into(descriptor: int, offset: int, values: Tensor) -> None:
    """Fill a contiguous tensor with the bytes of an open file.

    Raises:
        OSError: the file ends too early.
    """
    left = _bytes_of(values)
    while left:
        done = os.preadv(descriptor, [left], offset)
        if done == 0:
            raise OSError(f"it ends {len(left)} bytes too early")
        left, offset = left[done:], offset + done


def write_from(descriptor: int, offset: int, values: Tensor) -> None:
    """Write the bytes of a contiguous tensor into an open file."""
    left = _bytes_of(values)
    while left:
        done = os.pwritev(descriptor, [left], offset)
        left, offset = left[done:], offset + done


def _bytes_of(values: Tensor) -> memoryview:
    assert values.is_contiguous()
    return memoryview(values.view(-1).view(torch.uint8).numpy())
