"""Muon on the matrices that a rank's data-parallel share holds, in batches of one shape.

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
from megatron_trinity.optimizer.exchange import Batch, Name, TensorParallelExchange
from megatron_trinity.optimizer.matrices import Piece
from megatron_trinity.optimizer.newton_schulz import Coefficients, flops, lr_scale, newton_schulz
from megatron_trinity.optimizer.units import Unit

MOMENTUM = "momentum_buffer"
BATCH_SHARE = 32
"""A batch has at most this part of all elements (or one matrix a rank): with the temporaries of the
iteration, about four times a batch, a step needs an eighth of the momentum on top of it."""
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


@dataclass(frozen=True)
class PlannedBatch:
    """A batch, and where this rank's pieces of it are: unit and rows."""

    batch: Batch
    group: str
    places: tuple[tuple[Unit, Piece], ...]


class Muon:
    """Updates the fp32 weights of units that keep them."""

    def __init__(self, config: MuonConfig, tensor_groups: Mapping[bool, ProcessGroup]) -> None:
        """Args: tensor_groups: the tensor-parallel group of experts (True) and of all else."""
        self._config = config
        self._groups = tensor_groups
        self._exchange = {key: TensorParallelExchange(g) for key, g in tensor_groups.items()}
        self._plan: dict[bool, list[PlannedBatch]] = {}

    def plan(self, units: Sequence[Unit]) -> None:
        """Settle the batches of `units`, those that this rank updates; once, on all ranks."""
        for experts, group in self._groups.items():
            own = [unit for unit in units if unit.experts == experts]
            self._plan[experts] = list(_batches(own, group, len(self._config.steps)))

    def work(self) -> list[tuple[Name, tuple[int, int]]]:
        """The matrices that this rank orthogonalises in a step, with their shapes."""
        return [
            (name, planned.batch.shape)
            for experts, plan in self._plan.items()
            for planned in plan
            for name in planned.batch.owned_by(self._groups[experts].rank())
        ]

    def accumulate(self, units: Sequence[Unit]) -> None:
        """Add the gradients of `units` to their momentum."""
        if not units:
            return
        momenta = [unit.state[MOMENTUM] for unit in units]
        torch._foreach_mul_(momenta, self._config.momentum)
        torch._foreach_add_(momenta, [unit.gradient for unit in units])

    def update(self, rates: Mapping[str, tuple[float, float]]) -> None:
        """Decay and update the weights of the planned units.

        Args:
            rates: group to learning rate and weight decay.
        """
        for experts, plan in self._plan.items():
            for planned in plan:
                self._update_batch(planned, *rates[planned.group], self._exchange[experts])

    def _update_batch(
        self,
        planned: PlannedBatch,
        lr: float,
        weight_decay: float,
        exchange: TensorParallelExchange,
    ) -> None:
        batch = planned.batch
        directions = [_rows(unit.state[MOMENTUM], piece) for unit, piece in planned.places]
        if self._config.nesterov and directions:
            gradients = [_rows(unit.gradient, piece) for unit, piece in planned.places]
            directions = list(torch._foreach_mul(directions, self._config.momentum))
            torch._foreach_add_(directions, gradients)
        matrices = exchange.gather(batch, directions)
        matrices = newton_schulz(matrices, self._config.steps, self._config.dtype)
        updates = exchange.scatter(batch, matrices.float(), directions)
        if not updates:
            return
        weights = [_rows(unit.master, piece) for unit, piece in planned.places]
        torch._foreach_mul_(weights, 1.0 - lr * weight_decay)
        torch._foreach_add_(weights, updates, alpha=-lr * lr_scale(*batch.shape))


def _rows(tensor: Tensor, piece: Piece) -> Tensor:
    return tensor[piece.rows[0] : piece.rows[1]]


def _batches(units: Sequence[Unit], group: ProcessGroup, steps: int) -> Iterator[PlannedBatch]:
    """Group the matrices by shape, and share each batch out over a tensor-parallel group."""
    own = [(unit, piece) for unit in units for piece in unit.pieces]
    everyone = _gathered([(unit.group.name, piece) for unit, piece in own], group)
    kinds: dict[tuple[str, tuple[int, int]], dict[Name, None]] = {}  # in order, each once
    for of_rank in everyone:
        for group_name, piece in of_rank:
            kinds.setdefault((group_name, piece.shape), {})[piece.matrix] = None
    total = sum(len(names) * shape[0] * shape[1] for (_, shape), names in kinds.items())
    limit = min(total // BATCH_SHARE, BATCH_ELEMENTS)
    loads = [0.0] * group.size()
    for (group_name, shape), names in kinds.items():
        size = max(group.size(), limit // (shape[0] * shape[1]))
        for start in range(0, len(names), size):
            chunk = list(names)[start : start + size]
            cost = flops(*shape, steps)
            owners = assign([cost] * len(chunk), group.size(), loads)
            for owner in owners:
                loads[owner] += cost
            chosen = set(chunk)
            yield PlannedBatch(
                batch=Batch(
                    shape=shape,
                    names=tuple(chunk),
                    owners=tuple(owners),
                    pieces=tuple(
                        tuple(piece for _, piece in of_rank if piece.matrix in chosen)
                        for of_rank in everyone
                    ),
                ),
                group=group_name,
                places=tuple((unit, piece) for unit, piece in own if piece.matrix in chosen),
            )


def _gathered(
    own: list[tuple[str, Piece]], group: ProcessGroup
) -> Sequence[Sequence[tuple[str, Piece]]]:
    if group.size() == 1:
        return [own]
    everyone: list[list[tuple[str, Piece]]] = [[] for _ in range(group.size())]
    dist.all_gather_object(everyone, own, group=group)
    return everyone
