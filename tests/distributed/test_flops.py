"""FLOPs of a step: of whole sequences, and of the documents of a global batch over ranks."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from megatron_trinity.planning.flops import training_flops
from megatron_trinity.planning.sizes import ModelSizes
from tests.distributed.pool import RankPools
from tests.trinity import afmoe_config, parse

LENGTH = 64
DOCUMENTS = [[[3, 61], [64]], [[20, 20, 24], [1, 63]]]  # data-parallel rank, micro-batch


def brute_force(lengths: list[int], window: int) -> int:
    """Pairs of one document after another, counted one by one."""
    return sum(
        1
        for length in lengths
        for query in range(length)
        for key in range(length)
        if query - window < key <= query
    )


def step(rank: int, world_size: int, packed: bool) -> tuple[float, Namespace]:
    from megatron.core import parallel_state
    from megatron.training import training

    from megatron_trinity.training.flops import StepFlops
    from megatron_trinity.upstream import flops as upstream

    args = parse(afmoe_config())
    args.vocab_size = 160
    parallel_state.initialize_model_parallel()
    counter = StepFlops(args)
    for _ in range(2):  # the second step starts again
        if packed:
            for micro_batch in DOCUMENTS[rank]:
                counter.note(torch.tensor(micro_batch))
        upstream.set_flop_counter(counter)
        try:
            tokens, pairs = training.consume_seqlen_stats_in_iteration()
            result = training.num_floating_point_operations(args, 4, pairs, tokens)
        finally:
            upstream._counter = None
    return result, args


@pytest.mark.parametrize("packed", [False, True])
def test_flops_of_a_step(ranks: RankPools, packed: bool) -> None:
    lengths = [n for of_rank in DOCUMENTS for micro_batch in of_rank for n in micro_batch]
    if not packed:
        lengths = [LENGTH] * 4
    for got, args in ranks.run(step, packed, world_size=2):
        pairs = (brute_force(lengths, LENGTH), brute_force(lengths, args.sliding_window))
        assert got == training_flops(ModelSizes.from_args(args), 4 * LENGTH, *pairs)
