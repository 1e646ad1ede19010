"""The documents that share a sequence: where each begins, so that none sees another.

Shapes: b sequences of the micro-batch, s tokens of a whole sequence, D documents in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(kw_only=True)
class Documents(PackedSeqParams):
    """What Megatron's layers pass to the core attention, and Trinity's to the router.

    Sequences keep their `[s, b]` shape and RoPE its positions in the sequence: it is relative, so
    that a document needs no positions of its own. Everything here is of whole sequences, the same
    on all ranks of a context- and tensor-parallel group.

    Attributes:
        starts: `[b, s]` int64, position of the first token of each token's document.
        ids: `[b, s]` int64, number of each token's document, 0 to D - 1 over all sequences.
        lengths: `[D]` int64.
        masks: what attention has made of `starts`, by window.
        parts: of the sequence, by their first token and the first key that they see.
    """

    starts: Tensor
    ids: Tensor
    lengths: Tensor
    masks: dict[int | None, Any] = field(default_factory=dict, repr=False)
    parts: dict[tuple[int, int], Documents] = field(default_factory=dict, repr=False)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, seq_length: int) -> Documents:
        """From `[b, n]` cumulative lengths that begin with 0 and end with any number of s."""
        rows = cu_seqlens.shape[0]
        first = torch.zeros(rows, seq_length + 1, dtype=torch.int64, device=cu_seqlens.device)
        first = first.scatter_(1, cu_seqlens.long(), 1)[:, :seq_length]
        positions = torch.arange(seq_length, device=cu_seqlens.device)
        ids = first.flatten().cumsum(0).view_as(first) - 1
        return cls(
            qkv_format="sbhd",
            max_seqlen_q=seq_length,  # of RoPE's positions, which documents share
            max_seqlen_kv=seq_length,
            starts=(first * positions).cummax(dim=1).values,
            ids=ids,
            lengths=torch.bincount(ids.flatten()),
        )

    def part(self, begin: int, length: int, first: int) -> Documents:
        """Of the tokens from `begin` on, counted in keys that begin with token `first`."""
        if (begin, first) not in self.parts:
            starts = (self.starts[:, begin : begin + length] - first).clamp(min=0)
            self.parts[begin, first] = replace(self, starts=starts, masks={}, parts={})
        return self.parts[begin, first]
