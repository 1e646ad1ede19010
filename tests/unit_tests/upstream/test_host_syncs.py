"""Adaptations that spare the host its waiting give upstream's numbers."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_trinity.planning.costs.host_syncs import HostSyncs
from megatron_trinity.planning.costs.operations import OperationCounter
from megatron_trinity.planning.costs.places import Places
from megatron_trinity.upstream.local_norms import l2_norm
from megatron_trinity.upstream.one_rank_stats import as_reduced
from tests.distributed.pool import RankPools


def test_the_local_norm_is_that_of_upstream_bit_by_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(64, 48), (7,), (3, 5, 129), (1,), (2048,)]
    tensors = [torch.randn(shape, generator=generator) * 10**k for k, shape in enumerate(shapes)]
    with HostSyncs(Places("all")) as syncs:
        norm, single = l2_norm(0, torch.zeros(1), [tensors], False)
    # As `local_multi_tensor_l2_norm` has it.
    expected = torch.norm(torch.tensor([[torch.norm(tensor) for tensor in tensors]]))
    assert (norm.shape, norm.item(), single) == ((1,), expected.item(), None)
    assert not syncs.found


def test_megatron_uses_it() -> None:
    from megatron.core.optimizer import clip_grads

    assert clip_grads.l2_norm_impl is l2_norm


@pytest.mark.parametrize("stat", [0.1, 3, math.inf, -1.0, None])
def test_a_stat_is_rounded_as_if_it_had_been_reduced(stat: float | None) -> None:
    sent = torch.tensor([-1.0 if stat is None else stat], dtype=torch.float32).item()
    assert as_reduced(stat) == (None if sent == -1.0 else sent)


def agreed(rank: int, world_size: int, tensor: int) -> tuple[list[object], int]:
    from megatron.core import parallel_state
    from megatron.training import training

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
    reduce = training.reduce_max_stat_across_model_parallel_group
    agree = training.logical_and_across_model_parallel_group
    with HostSyncs(Places("all")) as syncs:
        values: list[object] = [reduce(float(rank)), reduce(None), agree(rank == 0)]
    return values, syncs.found.total()


def test_ranks_agree_where_there_are_several(ranks: RankPools) -> None:
    alone = ranks.run(agreed, 1, world_size=2)
    assert alone == [([0.0, None, True], 0), ([1.0, None, False], 0)]
    together = ranks.run(agreed, 2, world_size=2)
    assert [values for values, _ in together] == [[1.0, None, False]] * 2
    assert all(number > 0 for _, number in together)


def judged(rank: int, world_size: int, bad: int | None) -> tuple[list[float], bool, int]:
    from megatron_trinity.upstream.gradient_checks import read_norms

    norms = [torch.tensor(1.0 + rank), torch.tensor(math.nan if rank == bad else 3e38)]
    with OperationCounter(Places("all")), HostSyncs(Places("all")) as syncs:
        along = torch.tensor([4.0, 0.5])
        values, anywhere, read = read_norms(norms[: 2 - (bad is None and rank)], False, along)
        assert read == [4.0, 0.5]
        finite = [float(value) for value in values if value.isfinite()]
    return finite, anywhere, syncs.found.total()


def test_the_norms_of_all_gradient_buffers_are_read_at_once(ranks: RankPools) -> None:
    large = float(torch.tensor(3e38))
    assert ranks.run(judged, None, world_size=2) == [([1.0, large], False, 1), ([2.0], False, 1)]
    # A rank whose own are finite learns of the other's.
    assert ranks.run(judged, 1, world_size=2) == [([1.0, large], True, 1), ([2.0], True, 1)]
