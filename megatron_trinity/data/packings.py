"""The ways to make samples of documents that a description can name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron_trinity.data.document_buffer import DocumentBufferPacking
from megatron_trinity.data.packing import Packing, SequentialPacking
from megatron_trinity.data.rows import RowPacking, best_fit, greedy


@dataclass(frozen=True)
class Packer:
    """A packing.

    Attributes:
        make: from the documents' lengths (`[d]` int32), the length of sequences and the seed.
        options: keywords that `make` takes beside them; whole numbers from 1 on.
        masking: it needs documents kept apart, since what stands side by side in a sample does not
            belong together.
        padding: samples are not full, so that an epoch has more of them than its tokens fill.
    """

    make: Callable[..., Packing]
    options: frozenset[str] = frozenset()
    masking: bool = True
    padding: bool = False


PACKINGS: dict[str, Packer] = {
    "sequential": Packer(SequentialPacking, masking=False),
    "in-order": Packer(partial(SequentialPacking, shuffle=False), masking=False),
    "document-buffer": Packer(DocumentBufferPacking, frozenset({"size", "buffers"})),
    "best-fit": Packer(partial(RowPacking, fit=best_fit), padding=True),
    "greedy": Packer(partial(RowPacking, fit=greedy), padding=True),
}
"""By the name that a description gives them."""
