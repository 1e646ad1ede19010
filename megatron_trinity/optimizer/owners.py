"""Who does the work where every rank keeps all state: each matrix is one rank's, by FLOPs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_trinity.optimizer.assignment import assign
from megatron_trinity.optimizer.newton_schulz import flops
from megatron_trinity.optimizer.ranks import DataParallel
from megatron_trinity.optimizer.units import Unit


def find_owners(units: Sequence[Unit], ranks: Mapping[bool, DataParallel]) -> None:
    """Set the owner of each unit: experts (True of `ranks`) first, the rest on top of their load.

    Collective over data-parallel and tensor-parallel ranks.
    """
    loads: list[float] = []
    for experts in (True, False):
        own = ranks[experts]
        free = [unit for unit in units if unit.experts == experts]
        costs = [_cost(unit) for unit in free]
        owners = assign(costs, own.size, loads)
        for unit, owner in zip(free, owners, strict=True):
            unit.owner = owner
        if experts:
            load = sum(c for c, owner in zip(costs, owners, strict=True) if owner == own.rank)
            loads = _loads(load, ranks[False])


def _loads(own: float, ranks: DataParallel) -> list[float]:
    """The experts' load of each data-parallel rank, the same on all tensor-parallel ranks."""
    loads = torch.zeros(ranks.size, dtype=torch.float64, device=torch.cuda.current_device())
    loads[ranks.rank] = own
    dist.all_reduce(loads, group=ranks.group)
    dist.all_reduce(loads, op=dist.ReduceOp.MAX, group=ranks.tensor)
    return [float(load) for load in loads]


def _cost(unit: Unit) -> float:
    """Of updating a unit: FLOPs, or elements where there is no matrix."""
    shapes: Iterable[tuple[int, int]] = {p.matrix: p.shape for p in unit.pieces}.values()
    return float(sum(flops(*shape, steps=1) for shape in shapes) or unit.weights.numel())
