"""Muon on the matrices that a rank holds, or holds parts of, in batches of one shape.

    M <- momentum M + G;  W <- (1 - lr decay) W - lr sqrt(max(1, fan_out / fan_in)) NS(M)

with NS the Newton-Schulz iteration (`newton_schulz`), for each matrix of the Hugging Face layout
(report, section 3 and eq. 41).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_trinity.optimizer.assignment import assign
from megatron_trinity.optimizer.exchange import Batch, BatchExchange, Name, Workspace
from megatron_trinity.optimizer.matrices import Piece
from megatron_trinity.optimizer.newton_schulz import Coefficients, flops, lr_scale, newton_schulz
from megatron_trinity.optimizer.units import Unit

MOMENTUM = "momentum_buffer"
BATCH_SHARE = 24
"""A batch has at most this part of all elements (or one matrix a rank): with the temporaries of the
iteration, about four times a batch, a step needs a sixth of the momentum on top of it."""
BATCH_ELEMENTS = 2**26  # and at most so many: more would not keep a GPU busier


@dataclass(frozen=True)
class MuonConfig:
    """What does not differ between groups.

    Attributes:
        momentum: factor of the old momentum.
        nesterov: orthogonalise G + momentum M in place of M.
        steps: coefficients of the Newton-Schulz steps.
        dtype: what their products are computed in.
    """

    momentum: float
    nesterov: bool
    steps: Coefficients
    dtype: torch.dtype


Held = tuple[str, Piece]
"""Of a rank: the group that a piece is updated with, and the piece."""


class PlannedBatch:
    """A batch, and the views of this rank's pieces of it."""

    def __init__(
        self,
        batch: Batch,
        group_name: str,
        ranks: ProcessGroup | None,
        places: Sequence[tuple[Unit, Piece]],
        workspace: Workspace,
    ) -> None:
        """Args: ranks: that hold the batch, None for this one alone; places: this rank's pieces."""
        self.batch, self.group_name = batch, group_name
        self.rank = ranks.rank() if ranks else 0
        self.exchange = BatchExchange(batch, ranks, workspace)
        self.momenta = [u.rows_of_piece(u.state[MOMENTUM], piece) for u, piece in places]
        self.weights = [u.rows_of_piece(u.master, piece) for u, piece in places]
        self._places = places

    def gradients(self) -> list[Tensor]:
        """Of this rank's pieces."""
        return [unit.rows_of_piece(unit.gradient, piece) for unit, piece in self._places]


class Muon:
    """Updates the fp32 weights of units that keep them."""

    def __init__(self, config: MuonConfig, groups: Mapping[bool, ProcessGroup]) -> None:
        """Args: groups: the ranks that hold parts of the same matrices: of experts (True), and of
        all else."""
        self._config = config
        self._groups = groups
        self._plan: list[PlannedBatch] = []
        self._weights: dict[str, list[Tensor]] = {}  # of each group

    def plan(
        self,
        units: Sequence[Unit],
        everywhere: Mapping[bool, Sequence[Sequence[Held]]] | None = None,
    ) -> None:
        """Settle the batches of `units`, those that this rank keeps; once, on all ranks.

        Args: everywhere: what each rank of the groups holds, if that is known; else they are asked.
        """
        workspace = Workspace()
        for experts, group in self._groups.items():
            own = [unit for unit in units if unit.experts == experts]
            mine = [(unit.group.name, piece) for unit in own for piece in unit.pieces]
            held = everywhere[experts] if everywhere else gathered(mine, group)
            for batch, group_name, is_shared in _batches(held, group.rank(), self._config.steps):
                chosen = set(batch.names)
                self._plan.append(
                    PlannedBatch(
                        batch,
                        group_name,
                        group if is_shared else None,
                        [(u, p) for u in own for p in u.pieces if p.matrix in chosen],
                        workspace,
                    )
                )
        for planned in self._plan:
            planned.exchange.make_views()
            if planned.weights:
                self._weights.setdefault(planned.group_name, []).extend(planned.weights)

    def work(self) -> list[tuple[Name, tuple[int, int]]]:
        """The matrices that this rank orthogonalises in a step, with their shapes."""
        return [
            (name, planned.batch.shape)
            for planned in self._plan
            for name in planned.batch.owned_by(planned.rank)
        ]

    def accumulate(self, momenta: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add gradients to the momentum of what they are of."""
        if momenta:
            torch._foreach_mul_(list(momenta), self._config.momentum)
            torch._foreach_add_(list(momenta), list(gradients))

    def update(self, rates: Mapping[str, tuple[float, float]]) -> None:
        """Decay and update the weights of the planned units.

        Args:
            rates: group to learning rate and weight decay.
        """
        for name, weights in self._weights.items():
            lr, weight_decay = rates[name]
            torch._foreach_mul_(weights, 1.0 - lr * weight_decay)
        for planned in self._plan:
            self._update_batch(planned, rates[planned.group_name][0])

    def _update_batch(self, planned: PlannedBatch, lr: float) -> None:
        directions = planned.momenta
        if self._config.nesterov and directions:
            directions = list(torch._foreach_mul(directions, self._config.momentum))
            torch._foreach_add_(directions, planned.gradients())
        matrices = planned.exchange.gather(directions)
        updates = planned.exchange.scatter(self._orthogonalised(matrices))
        if updates:
            torch._foreach_add_(
                planned.weights, updates, alpha=-lr * lr_scale(*planned.batch.shape)
            )

    def _orthogonalised(self, matrices: Tensor) -> Tensor:
        """`[B, fan_out, fan_in]` as well; `matrices` is overwritten."""
        if not len(matrices):
            return matrices
        if matrices.shape[1] <= matrices.shape[2]:
            return newton_schulz(matrices, self._config.steps, self._config.dtype)
        wide = matrices.mT
        if self._config.dtype == wide.dtype:  # which is computed in place
            wide = wide.contiguous()
        return newton_schulz(wide, self._config.steps, self._config.dtype).mT


def gathered[T](own: T, group: ProcessGroup) -> list[T]:
    """What each rank of `group` has."""
    if group.size() == 1:
        return [own]
    everyone = [own] * group.size()
    dist.all_gather_object(everyone, own, group=group)
    return everyone


def _batches(
    held: Sequence[Sequence[Held]], rank: int, steps: Coefficients
) -> Iterator[tuple[Batch, str, bool]]:
    """Group the matrices by shape; what only `rank` holds apart from what ranks have to exchange.

    Yields each batch, its group's name, and whether ranks exchange it: those on all ranks alike.
    """
    holders: dict[tuple[str, tuple[int, int]], dict[Name, set[int]]] = {}  # in order
    for number, of_rank in enumerate(held):
        for group_name, piece in of_rank:
            kind = holders.setdefault((group_name, piece.shape), {})
            kind.setdefault(piece.matrix, set()).add(number)
    total = sum(len(names) * shape[0] * shape[1] for (_, shape), names in holders.items())
    limit = min(total // len(held) // BATCH_SHARE, BATCH_ELEMENTS)  # of a rank
    loads = [0.0] * len(held)
    for (_, shape), names in holders.items():
        for ranks in names.values():
            if len(ranks) == 1:
                loads[min(ranks)] += flops(*shape, len(steps))
    for (group_name, shape), names in holders.items():
        size = max(1, limit // (shape[0] * shape[1]))
        alone = [name for name, ranks in names.items() if ranks == {rank}]
        for chunk in _chunks(alone, size):
            own = _pieces(held[rank : rank + 1], chunk)
            yield Batch(shape, chunk, (0,) * len(chunk), own), group_name, False
        shared = [name for name, ranks in names.items() if len(ranks) > 1]
        for chunk in _chunks(shared, size * len(held)):
            cost = flops(*shape, len(steps))
            owners = tuple(assign([cost] * len(chunk), len(held), loads))
            for owner in owners:
                loads[owner] += cost
            yield Batch(shape, chunk, owners, _pieces(held, chunk)), group_name, True


def _chunks(names: Sequence[Name], size: int) -> Iterator[tuple[Name, ...]]:
    for start in range(0, len(names), size):
        yield tuple(names[start : start + size])


def _pieces(held: Sequence[Sequence[Held]], names: Sequence[Name]) -> tuple[tuple[Piece, ...], ...]:
    chosen = set(names)
    return tuple(tuple(piece for _, piece in of_rank if piece.matrix in chosen) for of_rank in held)
