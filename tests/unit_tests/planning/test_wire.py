"""Gradients and weights on the wire, as the buffers of a real rank send them."""

from __future__ import annotations

import pytest

from benchmarks.communication import OVERLAP, count
from megatron_trinity.planning.fake_ranks import parse_layout
from megatron_trinity.planning.layouts import recommended
from megatron_trinity.planning.stages import stage_chunks
from megatron_trinity.planning.state import StageState
from megatron_trinity.planning.wire import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    REDUCE_SCATTER,
    SEND,
    Traffic,
    data_traffic,
    merged,
)

NAMES = {REDUCE_SCATTER: "reduce-scatter", ALL_GATHER: "all-gather"}


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "world_size"), [("nano", 64), ("large", 512)])
def test_buckets_of_a_rank(preset: str, world_size: int) -> None:
    """Of the second stage where there are several, as the counter has it."""
    wire = count(preset, world_size, "ours")
    args = parse_layout(preset, world_size, (*recommended(preset, world_size).flags, *OVERLAP))
    stages = stage_chunks(args)
    stage = min(1, len(stages) - 1)
    found = merged(list(data_traffic(args, StageState(args, stage, stages[stage]))))
    for kind, name in NAMES.items():
        parts = [part for part in found if part.kind == kind]
        counted = [(k.ranks, n, wire.calls[k]) for k, n in wire.bytes.items() if k.name == name]
        assert sorted((p.ranks, p.calls) for p in parts) == sorted((r, c) for r, _, c in counted)
        for part in parts:
            [size] = [size for ranks, size, _ in counted if ranks == part.ranks]
            assert part.sent == pytest.approx(size, abs=part.calls)  # rounded at each call
        assert all(part.hidden for part in parts)


def test_what_leaves_a_rank() -> None:
    """Rings over 4 ranks, of 100 bytes that each puts in."""
    sent = {
        kind: Traffic(kind, "data", 4, 100, 1).sent
        for kind in (ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, ALL_TO_ALL, SEND)
    }
    assert sent == {ALL_REDUCE: 150, REDUCE_SCATTER: 75, ALL_GATHER: 300, ALL_TO_ALL: 75, SEND: 100}


def test_parts_of_a_group_are_one() -> None:
    one = Traffic(SEND, "pipeline", 2, 3, 1)
    other = Traffic(SEND, "pipeline", 2, 4, 2)
    alone = Traffic(ALL_GATHER, "data", 1, 5, 1)
    assert merged([one, alone, other]) == [Traffic(SEND, "pipeline", 2, 7, 3)]
