"""Passes of a pipeline rank, against Megatron's schedules."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace

import pytest

from megatron_trinity.planning.schedule import idle_share, micro_batches, passes, warm_up


def run(stages: int, number: int) -> Namespace:
    return Namespace(
        pipeline_model_parallel_size=stages,
        microbatch_group_size_per_vp_stage=None,
        global_batch_size=2 * number,
        micro_batch_size=1,
        data_parallel_size=2,
    )


CASES = [(1, 1, 3), (2, 1, 4), (4, 1, 2), (4, 1, 8), (2, 2, 4), (4, 2, 8), (4, 3, 12), (8, 2, 48)]


@pytest.mark.parametrize(("stages", "chunks", "number"), CASES)
def test_warm_up_is_megatrons(stages: int, chunks: int, number: int) -> None:
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    for stage in range(stages):
        group = SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage)
        virtual = chunks if chunks > 1 else None
        communicator = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual)
        expected = get_pp_rank_microbatches(number, chunks, stages, p2p_communicator=communicator)
        assert warm_up(run(stages, number), stage, chunks, number) == expected[2]


@pytest.mark.parametrize(("stages", "chunks", "number"), CASES)
def test_every_micro_batch_passes_every_chunk(stages: int, chunks: int, number: int) -> None:
    args = run(stages, number)
    assert micro_batches(args) == number
    of_step = min(number, 4 * stages)
    for stage in range(stages):
        moments = list(passes(args, stage, chunks))
        for backward in (False, True):
            found = [m.chunk for m in moments if m.backward == backward]
            assert sorted(found) == sorted(list(range(chunks)) * of_step)
        assert moments[-1].in_flight[0] == 1
        assert all(m.in_flight[m.chunk] >= 1 for m in moments)


def test_in_flight() -> None:
    """Of 8 ranks with two chunks the first has 23 at once: 14 + 8 ahead, and one."""
    moments = list(passes(run(8, 48), 0, 2))
    assert max(sum(m.in_flight) for m in moments) == 23
    assert [max(sum(m.in_flight) for m in passes(run(4, 8), s, 1)) for s in range(4)] == [
        4,
        3,
        2,
        1,
    ]
    assert idle_share(run(8, 48), 2) == pytest.approx(7 / 96)
