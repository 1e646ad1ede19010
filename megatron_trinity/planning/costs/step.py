"""All that is counted of one step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from megatron_trinity.planning.costs.host_syncs import HostSync, HostSyncs
from megatron_trinity.planning.costs.kept import KeptBytes
from megatron_trinity.planning.costs.operations import OperationCounter
from megatron_trinity.planning.costs.places import Places


@dataclass(frozen=True)
class Counts:
    """Of one step.

    Attributes:
        launches: by part.
        collectives: bytes by kind.
        syncs: by place.
        kept: bytes for the backward pass, by part.
    """

    launches: Counter[str]
    collectives: Counter[str]
    syncs: Counter[HostSync]
    kept: Counter[str]


def count_step(step: Callable[[], object], places: Places, left_out: Iterable[Tensor]) -> Counts:
    """Run `step`, whose parts `places` knows; kept bytes leave out `left_out`."""
    operations, syncs = OperationCounter(places), HostSyncs(places)
    kept = KeptBytes(places, left_out)
    with kept, operations, syncs:
        step()
    launches: Counter[str] = Counter()
    for (part, _), number in operations.launches.items():
        launches[part] += number
    collectives: Counter[str] = Counter()
    for (_, kind), size in operations.collectives.items():
        collectives[kind] += size
    return Counts(launches, collectives, syncs.found, kept.kept)
