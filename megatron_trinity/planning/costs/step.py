"""All that is counted of one step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from megatron_trinity.planning.costs.host_syncs import HostSync, HostSyncs
from megatron_trinity.planning.costs.kept import KeptBytes
from megatron_trinity.planning.costs.operations import PRODUCTS, OperationCounter
from megatron_trinity.planning.costs.places import Places


@dataclass(frozen=True)
class Counts:
    """Of one step.

    Attributes:
        launches: by part.
        products: those of them that are products of matrices, by part.
        collectives: bytes by kind.
        calls: collectives, by part.
        syncs: by place.
        kept: bytes for the backward pass, by part.
    """

    launches: Counter[str]
    products: Counter[str]
    collectives: Counter[str]
    calls: Counter[str]
    syncs: Counter[HostSync]
    kept: Counter[str]


def count_step(step: Callable[[], object], places: Places, left_out: Iterable[Tensor]) -> Counts:
    """Run `step`, whose parts `places` knows; kept bytes leave out `left_out`."""
    operations, syncs = OperationCounter(places), HostSyncs(places)
    kept = KeptBytes(places, left_out)
    with kept, operations, syncs:
        step()
    launches: Counter[str] = Counter()
    products: Counter[str] = Counter()
    for (part, name), number in operations.launches.items():
        launches[part] += number
        products[part] += number * (name in PRODUCTS)
    collectives: Counter[str] = Counter()
    for (_, kind), size in operations.collectives.items():
        collectives[kind] += size
    return Counts(launches, products, collectives, operations.calls, syncs.found, kept.kept)
