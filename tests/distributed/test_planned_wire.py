"""What a plan says that a micro-batch puts on the wire, and the collectives that ranks call."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from megatron_trinity.planning.activations import Activations
from megatron_trinity.planning.costs.operations import OperationCounter
from megatron_trinity.planning.costs.places import Places
from megatron_trinity.planning.kernels import on_cpu
from megatron_trinity.planning.stages import stage_chunks
from megatron_trinity.planning.wire import chunk_traffic, merged
from tests.distributed.pool import RankPools
from tests.trainer import FULL_RECOMPUTE
from tests.unit_tests.planning.kept import forward

BATCH = 2
SMALL = 1024
"""Bytes of what tells ranks numbers of tokens, which no plan has."""
TP = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
EP, CP = ("--expert-model-parallel-size", "2"), ("--context-parallel-size", "2")
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "TP 2": (2, TP),
    "TP 2, ETP 1, full recompute": (
        2,
        (*TP, "--expert-tensor-parallel-size", "1", *FULL_RECOMPUTE),
    ),
    "EP 2": (2, EP),
    "EP 2, full recompute": (2, (*EP, *FULL_RECOMPUTE)),
    "CP 2, all-gather": (2, CP),
    "CP 2, a2a": (2, (*CP, "--cp-comm-type", "a2a")),
    "TP 2, EP 2, ETP 1": (2, (*TP, *EP, "--expert-tensor-parallel-size", "1")),
}


class Large(OperationCounter):
    """Counts collectives that move more than a few numbers."""

    def __init__(self) -> None:
        super().__init__(Places("all"))
        self.bytes: Counter[str] = Counter()
        self.number: Counter[str] = Counter()

    def _collective(self, name: str, args: Any) -> None:
        before = self.collectives.copy()
        super()._collective(name, args)
        for (_, kind), size in (self.collectives - before).items():
            if size > SMALL:
                self.bytes[kind] += size
                self.number[kind] += 1


def traffic(rank: int, world_size: int, flags: tuple[str, ...]) -> Any:
    """Bytes and calls by kind: planned, and counted of a forward and a backward pass."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_trinity.planning.fake_ranks import parse_layout

    args = parse_layout("tiny", world_size, ("--micro-batch-size", str(BATCH), *flags))
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    activations = Activations(args, on_cpu(args))
    [[chunk]] = stage_chunks(args)
    planned = merged(list(chunk_traffic(activations, chunk)))
    sizes: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for part in planned:
        sizes[part.kind] += part.bytes
        calls[part.kind] += part.calls
    counter = Large()
    with counter:
        _, output = forward(args, ProcessGroupCollection.use_mpu_process_groups())
        output[0].sum().backward()
    return dict(sizes), dict(calls), dict(counter.bytes), dict(counter.number)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_micro_batch(ranks: RankPools, name: str) -> None:
    """Over all ranks: which of them gets more tokens is the router's choice."""
    world_size, flags = CASES[name]
    found = ranks.run(traffic, flags, world_size=world_size)
    total: Counter[str] = Counter()
    for planned, calls, counted, number in found:
        assert number == calls
        total.update(planned)
        total.subtract(counted)
        assert counted.keys() == planned.keys()
    assert set(total.values()) == {0}
