"""Sampling by length for long context: few of the short documents, most of the long ones.

The report's stage of long context takes documents of its pretraining data with a probability that
rises with their length, from 1 % to 90 % for those of 128K tokens and more. How it rises in between
is not told. Here it is proportional to the length, which is the simplest curve that ends there:
90 % at 131,072 tokens, 9 % at 13,107 and, below 1,457, the 1 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_trinity.data.permutation import key_of


@dataclass(frozen=True)
class LengthBias:
    """How likely a document is taken.

    Attributes:
        floor: at least so likely, however short.
        ceiling: at most so likely, however long.
        full_at: tokens from which on a document has the ceiling.
    """

    floor: float = 0.01
    ceiling: float = 0.9
    full_at: int = 131072

    def probability(self, lengths: NDArray[np.integer]) -> NDArray[np.float64]:
        """Of documents of so many tokens, `[d]`."""
        return np.clip(self.ceiling * lengths / self.full_at, self.floor, self.ceiling)

    def taken(self, lengths: NDArray[np.int32], seed: int) -> NDArray[np.int32]:
        """`lengths`, `[d]`, with 0 for the documents that are left out.

        Which those are depends on the seed, the number of a document and its length.
        """
        key = int.from_bytes(key_of("length bias", seed)[:16], "little")
        numbers = np.random.Philox(key=key).random_raw(len(lengths))
        points = (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53  # in [0, 1)
        return np.where(points < self.probability(lengths), lengths, np.int32(0))
