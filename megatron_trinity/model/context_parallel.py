"""Sequences that are spread over context-parallel ranks, and how attention gets what it needs.

A sequence is cut into 2N chunks for N ranks; rank r holds chunks r and 2N - 1 - r, so that causal
attention is as much work on each (Megatron's zigzag, for its batches and for RoPE).

Shapes: s tokens of a whole sequence, N ranks, L = s / 2N tokens of a chunk, b batch, h heads of any
kind, d features, W window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup


def chunks_of(rank: int, ranks: int) -> tuple[int, int]:
    """The chunks that a rank holds, in the order in which it holds them."""
    return rank, 2 * ranks - 1 - rank


def to_zigzag(tensor: Tensor, ranks: int) -> Tensor:
    """Reorder dimension 0 from the order of the sequence to that of the ranks."""
    return _reorder(tensor, _held(ranks))


def from_zigzag(tensor: Tensor, ranks: int) -> Tensor:
    """The inverse of `to_zigzag`."""
    held = _held(ranks)
    return _reorder(tensor, [held.index(chunk) for chunk in range(2 * ranks)])


def this_rank_part(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """`[s, ...]` to the `[s / N, ...]` of this rank."""
    chunks = tensor.chunk(2 * group.size())
    return torch.cat([chunks[chunk] for chunk in chunks_of(group.rank(), group.size())])


def _held(ranks: int) -> list[int]:
    """The chunks of all ranks, one rank after another."""
    return [chunk for rank in range(ranks) for chunk in chunks_of(rank, ranks)]


def _reorder(tensor: Tensor, order: list[int]) -> Tensor:
    parts = tensor.unflatten(0, (len(order), -1))
    return parts[torch.tensor(order, device=tensor.device)].flatten(0, 1)


def gather_sequence(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """`[s / N, ...]` of each rank to the whole `[s, ...]`; gradients are summed over the ranks."""
    gathered = gather_from_sequence_parallel_region(tensor, group=group)
    return from_zigzag(gathered, group.size())


def sequence_to_heads(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """`[s / N, b, h, d]` to `[s, b, h / N, d]`: rank r gets the r-th part of the heads."""
    ranks = group.size()
    by_rank = torch.cat(tensor.chunk(ranks, dim=2))  # [N * s / N, b, h / N, d]
    return from_zigzag(all_to_all(group, by_rank.contiguous()), ranks)


def heads_to_sequence(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The inverse of `sequence_to_heads`."""
    ranks = group.size()
    by_rank = all_to_all(group, to_zigzag(tensor, ranks).contiguous())
    return torch.cat(by_rank.chunk(ranks), dim=2)


@dataclass(frozen=True)
class Piece:
    """A run of tokens that the window of one chunk reaches in another.

    Attributes:
        target, source: the chunk that needs it, and the chunk that it is a part of.
        first: its first token, counted from the start of the source; it ends where the source does.
    """

    target: int
    source: int
    first: int


def pieces_of(target: int, length: int, window: int) -> Iterator[Piece]:
    """What chunk `target` needs of the W - 1 tokens ahead of it, in the order of the sequence."""
    begin = max(0, target * length - (window - 1))
    for source in range(begin // length, target):
        yield Piece(target, source, max(0, begin - source * length))


def exchange_windows(tensor: Tensor, window: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """What a window needs on this rank, instead of the whole sequence.

    Args:
        tensor: `[2L, b, h, d]`, this rank's two chunks.
        window: W.
    Returns: for each of the two chunks `[p + L, b, h, d]`, where p is W - 1, or fewer near the
        start of the sequence. Gradients go back to the ranks that the tokens came from.
    """
    ranks, rank = group.size(), group.rank()
    length = tensor.shape[0] // 2
    held = dict(zip(chunks_of(rank, ranks), tensor.chunk(2), strict=True))

    def pieces(source: int, target: int) -> list[Piece]:
        """From one rank to another."""
        return [
            piece
            for chunk in chunks_of(target, ranks)
            for piece in pieces_of(chunk, length, window)
            if piece.source in chunks_of(source, ranks)
        ]

    outgoing = [pieces(rank, other) for other in range(ranks)]
    incoming = [pieces(other, rank) for other in range(ranks)]
    sent = [held[piece.source][piece.first :] for to_rank in outgoing for piece in to_rank]
    received = all_to_all(
        group,
        torch.cat([tensor[:0], *sent]),
        _rows(incoming, length),
        _rows(outgoing, length),
    )
    order = [piece for from_rank in incoming for piece in from_rank]
    runs = received.split([length - piece.first for piece in order])
    by_chunk = {(piece.target, piece.source): run for piece, run in zip(order, runs, strict=True)}
    first, second = (
        torch.cat([*(by_chunk[key] for key in sorted(by_chunk) if key[0] == chunk), own])
        for chunk, own in held.items()
    )
    return first, second


def _rows(pieces: list[list[Piece]], length: int) -> list[int]:
    return [sum(length - piece.first for piece in of_rank) for of_rank in pieces]
