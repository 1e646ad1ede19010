"""Moving matrices and weights between ranks: to the rank that works on them, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_trinity.optimizer.matrices import Piece

Name = tuple[str, tuple[int, ...], str]  # of a matrix, see `Piece.matrix`

BUCKET_BYTES = 32 * 2**20  # of small tensors that are sent as one


@dataclass(frozen=True)
class Batch:
    """Matrices of one shape that are orthogonalised together, and who holds what of them.

    Attributes:
        shape: (fan_out, fan_in) of each.
        names: of the matrices.
        owners: for each, the tensor-parallel rank that works on it.
        pieces: for each tensor-parallel rank, what it holds, in the order of `names`.
    """

    shape: tuple[int, int]
    names: tuple[Name, ...]
    owners: tuple[int, ...]
    pieces: tuple[tuple[Piece, ...], ...]

    def owned_by(self, rank: int) -> list[Name]:
        """The matrices that a tensor-parallel rank works on, in order."""
        return [name for name, owner in zip(self.names, self.owners, strict=True) if owner == rank]


class TensorParallelExchange:
    """Brings the matrices of a batch to their owners in a tensor-parallel group, and back.

    With one rank nothing is sent. A matrix that every rank holds whole is sent by each; the copies
    are equal.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._rank, self._size = group.rank(), group.size()

    def gather(self, batch: Batch, held: Sequence[Tensor]) -> Tensor:
        """The matrices that this rank owns, `[B, m, n]` fp32, m at most n: tall ones transposed.

        Args:
            held: this rank's pieces, `[rows, columns]` fp32 each.
        """
        mine = batch.owned_by(self._rank)
        rows, columns = batch.shape
        matrices = torch.empty(
            (len(mine), min(rows, columns), max(rows, columns)), device=torch.cuda.current_device()
        )
        places = self._places(batch, matrices)
        if self._size == 1:
            torch._foreach_copy_(places[0], list(held))
            return matrices
        outgoing = [[held[index] for index in indices] for indices in self._by_owner(batch)]
        for parts, incoming in zip(
            places, self._all_to_all(outgoing, [_numel(part) for part in places]), strict=True
        ):
            _scatter(incoming, parts)
        return matrices

    def scatter(self, batch: Batch, matrices: Tensor, held: Sequence[Tensor]) -> list[Tensor]:
        """What `gather` brought, changed, goes back to where it came from.

        Args:
            held: this rank's pieces, for their shapes.
        Returns: the new pieces, `[rows, columns]` each, in their order.
        """
        places = self._places(batch, matrices)
        if self._size == 1:
            return places[0]
        order = self._by_owner(batch)
        counts = [sum(held[index].numel() for index in indices) for indices in order]
        pieces: list[Tensor] = [matrices] * len(held)
        for indices, incoming in zip(order, self._all_to_all(places, counts), strict=True):
            parts = incoming.split([held[index].numel() for index in indices])
            for index, part in zip(indices, parts, strict=True):
                pieces[index] = part.view(held[index].shape)
        return pieces

    def _by_owner(self, batch: Batch) -> list[list[int]]:
        """For each rank, the numbers of this rank's pieces that go to it."""
        owner = dict(zip(batch.names, batch.owners, strict=True))
        numbers: list[list[int]] = [[] for _ in range(self._size)]
        for number, piece in enumerate(batch.pieces[self._rank]):
            numbers[owner[piece.matrix]].append(number)
        return numbers

    def _places(self, batch: Batch, matrices: Tensor) -> list[list[Tensor]]:
        """For each rank, the views of `matrices` that its pieces fill."""
        upright = matrices.mT if batch.shape[0] > batch.shape[1] else matrices
        number = {name: index for index, name in enumerate(batch.owned_by(self._rank))}
        return [
            [
                upright[number[p.matrix]][
                    p.row : p.row + p.rows[1] - p.rows[0], p.column : p.column + p.columns
                ]
                for p in pieces
                if p.matrix in number
            ]
            for pieces in batch.pieces
        ]

    def _all_to_all(
        self, outgoing: Sequence[Sequence[Tensor]], counts: Sequence[int]
    ) -> Sequence[Tensor]:
        """Send a list of tensors to each rank; returns what came from each, flat."""
        sent = [tensor.reshape(-1) for tensors in outgoing for tensor in tensors]
        received = torch.empty(sum(counts), device=torch.cuda.current_device())
        flat = torch.cat(sent) if sent else received.new_empty(0)
        dist.all_to_all_single(
            received, flat, list(counts), [_numel(part) for part in outgoing], group=self._group
        )
        return received.split(list(counts))


def broadcast_from_owners(
    tensors: Sequence[Sequence[Tensor]], group: ProcessGroup, bucket_bytes: int = BUCKET_BYTES
) -> None:
    """Fill `tensors[rank]` of every rank of `group` with what that rank has in them.

    Small tensors travel together. Nothing overlaps: all have arrived when this returns.

    Args:
        tensors: for each rank of the group, contiguous tensors; the same lists on every rank.
    """
    if group.size() == 1:
        return
    for rank, of_rank in enumerate(tensors):
        source = dist.get_global_rank(group, rank)
        for bucket in _buckets(of_rank, bucket_bytes):
            if len(bucket) == 1:
                dist.broadcast(bucket[0], source, group=group)
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.broadcast(flat, source, group=group)
            if rank != group.rank():
                _scatter(flat, bucket)


def _buckets(tensors: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype with at most `limit` bytes, or one tensor."""
    bucket: list[Tensor] = []
    filled = 0
    for tensor in sorted(tensors, key=lambda t: str(t.dtype)):
        if bucket and (filled + tensor.nbytes > limit or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.nbytes
    if bucket:
        yield bucket


def _scatter(flat: Tensor, places: Sequence[Tensor]) -> None:
    parts = flat.split([place.numel() for place in places])
    for part, place in zip(parts, places, strict=True):
        place.copy_(part.view(place.shape))


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
