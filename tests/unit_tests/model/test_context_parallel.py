"""Sequences over ranks: what each gets, and that gradients go back to where tokens came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_trinity.model.context_parallel import (
    Piece,
    chunks_of,
    exchange_windows,
    from_zigzag,
    gather_sequence,
    heads_to_sequence,
    pieces_of,
    sequence_to_heads,
    this_rank_part,
    to_zigzag,
)
from tests.distributed.pool import RankPools

LENGTH, BATCH, HEADS, SIZE = 24, 2, 4, 3


def whole() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(LENGTH, BATCH, HEADS, SIZE, generator=generator)


def test_the_zigzag() -> None:
    assert [chunks_of(rank, 3) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]
    sequence = torch.arange(12)
    assert to_zigzag(sequence, 3).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    assert torch.equal(from_zigzag(to_zigzag(sequence, 3), 3), sequence)


@pytest.mark.parametrize(
    ("target", "window", "expected"),
    [
        (0, 5, []),
        (1, 5, [Piece(1, 0, 0)]),
        (2, 5, [Piece(2, 1, 0)]),
        (2, 4, [Piece(2, 1, 1)]),
        (2, 1, []),
        (3, 6, [Piece(3, 1, 3), Piece(3, 2, 0)]),
        (3, 100, [Piece(3, 0, 0), Piece(3, 1, 0), Piece(3, 2, 0)]),
    ],
)
def test_pieces_of_chunks_of_four(target: int, window: int, expected: list[Piece]) -> None:
    assert list(pieces_of(target, 4, window)) == expected


def parts(rank: int, world_size: int, window: int) -> tuple[list[Tensor], Tensor, list[int]]:
    """What a rank gets, the gradient of its part for cotangents of ones, and what it received."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(context_parallel_size=world_size)
    group = dist.group.WORLD
    assert group is not None
    sizes: list[int] = []
    plain = dist.all_to_all_single

    def counting(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(output.shape[0])
        return plain(output, *args, **kwargs)

    part = this_rank_part(whole(), group).clone().requires_grad_()
    dist.all_to_all_single = counting
    try:
        got = exchange_windows(part, window, group)
    finally:
        dist.all_to_all_single = plain
    gathered = gather_sequence(part, group)
    assert torch.equal(gathered, whole())
    by_heads = sequence_to_heads(part, group)
    assert torch.equal(by_heads, whole().chunk(world_size, dim=2)[rank])
    assert torch.equal(heads_to_sequence(by_heads, group), part)
    [of_gather] = torch.autograd.grad(gathered.sum(), part)
    assert torch.equal(of_gather, torch.full_like(part, world_size))
    cotangent = by_heads.detach() * (rank + 1)
    [of_heads] = torch.autograd.grad((by_heads * cotangent).sum(), part)
    factor = torch.arange(1, world_size + 1).repeat_interleave(HEADS // world_size)
    torch.testing.assert_close(of_heads, part.detach() * factor.view(1, 1, HEADS, 1))
    [gradient] = torch.autograd.grad(torch.cat(got).sum(), part)
    return [tensor.detach() for tensor in got], gradient, sizes


def check_windows(
    results: Sequence[tuple[list[Tensor], Tensor, list[int]]], ranks: int, window: int
) -> None:
    length = LENGTH // (2 * ranks)
    times_used = torch.zeros(LENGTH)
    for rank, (got, _, sizes) in enumerate(results):
        received = 0
        for chunk, tensor in zip(chunks_of(rank, ranks), got, strict=True):
            begin = max(0, chunk * length - (window - 1))
            end = (chunk + 1) * length
            assert torch.equal(tensor, whole()[begin:end])
            times_used[begin:end] += 1
            received += chunk * length - begin
        # A local layer pays for its window, and not for the sequence.
        assert sizes == [received]
    for rank, (_, gradient, _) in enumerate(results):
        expected = to_zigzag(times_used, ranks).chunk(ranks)[rank]
        assert torch.equal(gradient, expected.view(-1, 1, 1, 1).expand_as(gradient))


@pytest.mark.parametrize("window", [1, 3, 4, 7, 24])
@pytest.mark.parametrize("world_size", [2, 4])
def test_parts_of_sequences(ranks: RankPools, window: int, world_size: int) -> None:
    check_windows(ranks.run(parts, window, world_size=world_size), world_size, window)
