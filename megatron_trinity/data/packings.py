"""The ways to make samples of documents that a description can name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_trinity.data.packing import Packing, SequentialPacking


@dataclass(frozen=True)
class Packer:
    """A packing.

    Attributes:
        make: from the documents' lengths (`[d]` int32), the length of sequences and the seed.
        options: keywords that `make` takes beside them.
    """

    make: Callable[..., Packing]
    options: frozenset[str] = frozenset()


PACKINGS: dict[str, Packer] = {"sequential": Packer(SequentialPacking)}
"""By the name that a description gives them."""
