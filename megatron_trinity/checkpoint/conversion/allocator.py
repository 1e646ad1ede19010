"""Memory that a slice leaves goes back to the system.

glibc puts blocks of up to 32 MiB on its heap once it has freed one of them. A small object that is
kept then takes the start of the hole that a slice leaves, the next slice no longer fits, and a
long run holds as much as it has read.
"""

from __future__ import annotations

import contextlib
import ctypes

MMAP_THRESHOLD = -3
"""`M_MMAP_THRESHOLD` of glibc's malloc.h."""

LARGE = 2**20
"""Bytes from which a block is one of its own, which the system takes back."""


def return_freed_memory() -> None:
    """From now on, in this process; does nothing without glibc."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE)
