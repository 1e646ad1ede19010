"""The documents that share a sequence: where each begins, so that none sees another.

Shapes: b sequences of the micro-batch, s tokens of a whole sequence, D documents in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The documents of a run of queries, packed one behind another, row of the batch by row.

    Attributes:
        unseen: for each row, how many of the first keys no query of the run may see: they are to be
            left out.
        cu_queries, cu_keys: `[n + 1]` int32 on the device, cumulative lengths of the n parts of
            documents in what is left.
        longest_queries, longest_keys: the longest of each, known on the host.
    """

    unseen: tuple[int, ...]
    cu_queries: Tensor
    cu_keys: Tensor
    longest_queries: int
    longest_keys: int


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
        padding: `[b, s]` bool, true for what is behind the documents of a row, which is a document
            of its own here; None where no row may have any.
        masks: what attention has made of `starts`, by window.
        parts: of the sequence, by their first token, their length and the first key that they see.
    """

    starts: Tensor
    ids: Tensor
    lengths: Tensor
    padding: Tensor | None = None
    masks: dict[int | None, Any] = field(default_factory=dict, repr=False)
    parts: dict[tuple[int, int, int], Documents] = field(default_factory=dict, repr=False)
    _segments: dict[tuple[int, int, int], Segments] = field(default_factory=dict, repr=False)
    _ends: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    @cached_property
    def counted(self) -> Tensor:
        """`[D]` int64, the tokens of each document that are no padding."""
        if self.padding is None:
            return self.lengths
        return torch.zeros_like(self.lengths).index_add_(
            0, self.ids.flatten(), (~self.padding).flatten().long()
        )

    @cached_property
    def shares(self) -> Tensor:
        """`[D]` fp32, the share of each document in the tokens of its row that are no padding."""
        real = torch.ones_like(self.ids) if self.padding is None else (~self.padding).long()
        of_row = real / real.sum(dim=1, keepdim=True).clamp(min=1)
        return of_row.new_zeros(len(self.lengths)).index_add_(
            0, self.ids.flatten(), of_row.flatten()
        )

    def segments(self, position: int, rows: int, keys: int) -> Segments:
        """Of the queries `position` ... `position + rows - 1` over the `keys` that end with them.

        Layers ask for the same few again and again, so each is made once, and the lengths are read
        from the device once a micro-batch.
        """
        run = (position, rows, keys)
        if run not in self._segments:
            self._segments[run] = self._segments_of(*run)
        return self._segments[run]

    def _segments_of(self, position: int, rows: int, keys: int) -> Segments:
        end, first_key = position + rows, position + rows - keys
        unseen, of_queries, of_keys = [], [], []
        for ends in self._ends_on_host():
            parts = [
                (max(begin, position), max(begin, first_key), min(stop, end))
                for begin, stop in pairwise((0, *ends))
                if begin < end and stop > position
            ]
            unseen.append(parts[0][1] - first_key)
            of_queries += [stop - query for query, _, stop in parts]
            of_keys += [stop - key for _, key, stop in parts]
        return Segments(
            unseen=tuple(unseen),
            cu_queries=self._cumulative(of_queries),
            cu_keys=self._cumulative(of_keys),
            longest_queries=max(of_queries),
            longest_keys=max(of_keys),
        )

    def _cumulative(self, lengths: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.starts.device)

    def _ends_on_host(self) -> tuple[tuple[int, ...], ...]:
        """For each sequence the positions behind its documents."""
        if not self._ends:
            total, length = list(accumulate(self.lengths.tolist())), self.starts.shape[1]
            rows: list[list[int]] = [[] for _ in range(self.starts.shape[0])]
            for end in total:
                row = (end - 1) // length
                rows[row].append(end - row * length)
            self._ends = tuple(map(tuple, rows))
        return self._ends

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Tensor, seq_length: int, padded: bool = False
    ) -> Documents:
        """From `[b, n]` cumulative lengths that begin with 0.

        They end with any number of s, or where rows may be `padded`, of the tokens ahead of the
        padding.
        """
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
            padding=positions >= cu_seqlens[:, -1:] if padded else None,
        )

    def part(self, begin: int, length: int, first: int) -> Documents:
        """Of the tokens from `begin` on, counted in keys that begin with token `first`."""
        if (begin, length, first) == (0, self.starts.shape[1], 0):
            return self
        run = (begin, length, first)
        if run not in self.parts:
            starts = (self.starts[:, begin : begin + length] - first).clamp(min=0)
            self.parts[run] = replace(self, starts=starts, masks={}, parts={})
        return self.parts[run]
