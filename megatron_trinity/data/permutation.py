"""Orders that a key decides: as tables, and one place at a time without a table."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_WORD = (1 << 64) - 1


def key_of(*parts: object) -> bytes:
    """32 bytes that differ wherever one of `parts` does."""
    return hashlib.sha256(repr(parts).encode()).digest()


def shuffled(count: int, *key: object) -> NDArray[np.signedinteger]:
    """`0 ... count - 1` in the order that `key` decides, `[count]`.

    The legacy generator of NumPy is the one whose stream no later version changes.
    """
    numbers: NDArray[np.signedinteger] = np.arange(
        count, dtype=np.int32 if count < 1 << 31 else np.int64
    )
    np.random.RandomState(np.frombuffer(key_of(*key), dtype="<u4")).shuffle(numbers)
    return numbers


class Permutation:
    """An order of `0 ... size - 1` of any size, each place computed when it is asked for.

    A Feistel network permutes the powers of four at or above `size`; a number that falls behind
    `size` goes through it again, until one does not.
    """

    def __init__(self, size: int, *key: object) -> None:
        self._size = size
        self._half = max((size - 1).bit_length() + 1, 2) // 2
        self._mask = (1 << self._half) - 1
        numbers = key_of("permutation", *key) + key_of("more", *key)
        self._keys = [int.from_bytes(numbers[8 * n : 8 * n + 8], "little") for n in range(_ROUNDS)]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        """What stands at `index`."""
        if not 0 <= index < self._size:
            raise IndexError(index)
        half, mask = self._half, self._mask
        while True:
            left, right = index >> half, index & mask
            for key in self._keys:
                mixed = ((right ^ key) * 0x9E3779B97F4A7C15) & _WORD
                mixed = ((mixed ^ (mixed >> 32)) * 0xD6E8FEB86659FD93) & _WORD
                left, right = right, left ^ ((mixed >> 32) & mask)
            index = left << half | right
            if index < self._size:
                return index
