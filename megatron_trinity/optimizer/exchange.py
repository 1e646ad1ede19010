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
        owners: for each, the rank that works on it.
        pieces: for each rank of the group, what it holds, in the order of `names`.
    """

    shape: tuple[int, int]
    names: tuple[Name, ...]
    owners: tuple[int, ...]
    pieces: tuple[tuple[Piece, ...], ...]

    def owned_by(self, rank: int) -> list[Name]:
        """The matrices that a rank works on, in order."""
        return [name for name, owner in zip(self.names, self.owners, strict=True) if owner == rank]

    def sent(self, rank: int) -> list[list[int]]:
        """For each rank, the numbers of the pieces that `rank` holds of its matrices."""
        owner = dict(zip(self.names, self.owners, strict=True))
        numbers: list[list[int]] = [[] for _ in self.pieces]
        for number, piece in enumerate(self.pieces[rank]):
            numbers[owner[piece.matrix]].append(number)
        return numbers

    def received(self, rank: int) -> list[list[Piece]]:
        """For each rank, the pieces that it holds of the matrices that `rank` works on."""
        own = set(self.owned_by(rank))
        return [[piece for piece in pieces if piece.matrix in own] for pieces in self.pieces]


class Workspace:
    """Memory that batches use one after the other, fp32 on the device: the most that one needs."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._flat: dict[str, Tensor] = {}

    def reserve(self, use: str, size: int) -> None:
        """Say that a batch needs `size` elements for a use."""
        self._sizes[use] = max(size, self._sizes.get(use, 0))

    def take(self, use: str, size: int) -> Tensor:
        """The first `size` elements for a use; ask when all is reserved."""
        if use not in self._flat:
            self._flat[use] = torch.empty(self._sizes[use], device=torch.cuda.current_device())
        return self._flat[use][:size]


class BatchExchange:
    """Brings the matrices of a batch to their owners in a group of ranks, and what becomes of them
    back: one all-to-all each way, and none if no matrix leaves its rank.

    A piece that several ranks hold is sent by each; the copies are equal. All views are made once.
    """

    def __init__(self, batch: Batch, group: ProcessGroup | None, workspace: Workspace) -> None:
        """Args: group: None where this rank alone holds all of the batch."""
        self._group = group
        rank = group.rank() if group else 0
        held = [(p.rows[1] - p.rows[0], p.columns) for p in batch.pieces[rank]]
        sent, self._received = batch.sent(rank), batch.received(rank)
        self._order = [number for numbers in sent for number in numbers]
        self._shapes = [held[number] for number in self._order]
        self._sent_counts = [sum(_area(held[n]) for n in numbers) for numbers in sent]
        self._received_counts = [
            sum((p.rows[1] - p.rows[0]) * p.columns for p in pieces) for pieces in self._received
        ]
        self._names = batch.owned_by(rank)
        self._shape = batch.shape
        self._workspace = workspace
        workspace.reserve("matrices", len(self._names) * _area(batch.shape))
        if group:
            workspace.reserve("sent", sum(self._sent_counts))
            workspace.reserve("received", sum(self._received_counts))

    def make_views(self) -> None:
        """Take from the workspace; once, when all batches have reserved in it."""
        size = len(self._names) * _area(self._shape)
        self._matrices = self._workspace.take("matrices", size).view(len(self._names), *self._shape)
        number = {name: index for index, name in enumerate(self._names)}
        self._places = [
            self._matrices[number[p.matrix]][
                p.row : p.row + p.rows[1] - p.rows[0], p.column : p.column + p.columns
            ]
            for pieces in self._received
            for p in pieces
        ]
        if self._group is None:
            self._back = self._places
            return
        self._outbox = self._workspace.take("sent", sum(self._sent_counts))
        self._inbox = self._workspace.take("received", sum(self._received_counts))
        self._outgoing = _views(self._outbox, self._shapes)
        self._incoming = _views(self._inbox, [tuple(place.shape) for place in self._places])
        by_number = dict(zip(self._order, self._outgoing, strict=True))
        self._back = [by_number[number] for number in range(len(self._order))]

    def gather(self, held: Sequence[Tensor]) -> Tensor:
        """The matrices that this rank owns, `[B, fan_out, fan_in]` fp32; valid until the next one.

        Args: held: this rank's pieces, `[rows, columns]` fp32 each.
        """
        if self._group is None:
            _copy(self._places, held)
        else:
            _copy(self._outgoing, [held[number] for number in self._order])
            self._all_to_all(self._inbox, self._outbox, self._received_counts, self._sent_counts)
            _copy(self._places, self._incoming)
        return self._matrices

    def scatter(self, matrices: Tensor) -> list[Tensor]:
        """What `gather` brought, changed, goes back to where it came from.

        Args: matrices: `[B, fan_out, fan_in]`, any dtype.
        Returns: the new pieces, `[rows, columns]` fp32 each, in their order; valid until the next.
        """
        if matrices is not self._matrices:
            self._matrices.copy_(matrices)
        if self._group is not None:
            _copy(self._incoming, self._places)
            self._all_to_all(self._outbox, self._inbox, self._sent_counts, self._received_counts)
        return self._back

    def _all_to_all(
        self, received: Tensor, sent: Tensor, received_counts: list[int], sent_counts: list[int]
    ) -> None:
        dist.all_to_all_single(received, sent, received_counts, sent_counts, group=self._group)


def _area(shape: Sequence[int]) -> int:
    return shape[0] * shape[1]


def _views(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    parts = flat.split([_area(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _copy(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if places:
        torch._foreach_copy_(list(places), list(values))


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
