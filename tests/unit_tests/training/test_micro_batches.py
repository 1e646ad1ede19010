"""Batch heterogeneity (report, eq. 40) and the logits of a global batch, against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_trinity.errors import TrinityError
from tests.distributed.pool import RankPools

# Of 8 micro-batches, each in two parts as context parallelism would cut it: sum of losses, tokens,
# largest logit.
RNG = np.random.default_rng(5)
TOKENS = RNG.integers(1, 60, size=(8, 2))
TOKENS[3] = 0  # no token in it carries loss
TOKENS[5, 0] = 0  # none in its first part
LOSSES = np.where(TOKENS, TOKENS * RNG.uniform(1.0, 4.0, size=(8, 2)), 0.0)
LOGITS = np.where(TOKENS, RNG.normal(10.0, 3.0, size=(8, 2)), -np.inf)
MEAN_LOGITS = TOKENS * RNG.normal(-0.5, 1.0, size=(8, 2))


def expected() -> dict[str, float]:
    whole = TOKENS.sum(axis=1) > 0
    means = LOSSES.sum(axis=1)[whole] / TOKENS.sum(axis=1)[whole]
    return {
        "batch heterogeneity": means.max() - means.mean(),
        "max logit": LOGITS.max(),
        "mean logit": MEAN_LOGITS.sum() / TOKENS.sum(),
    }


def reduce(
    rank: int, world_size: int, pipeline: int, context: int, empty: bool = False
) -> tuple[dict[str, float], dict[str, float]]:
    """The values of a step, and those of a step that saw nothing, straight after it."""
    from megatron.core import parallel_state

    from megatron_trinity.training.micro_batches import MicroBatchRecord

    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=pipeline, context_parallel_size=context
    )
    data_ranks = parallel_state.get_data_parallel_world_size()
    mine = range(len(TOKENS))[parallel_state.get_data_parallel_rank() :: data_ranks]
    record = MicroBatchRecord()
    if parallel_state.is_pipeline_last_stage():
        part = parallel_state.get_context_parallel_rank()
        for i in mine:
            part_of = slice(None) if context == 1 else part
            loss, tokens, logit = LOSSES[i, part_of], TOKENS[i, part_of], LOGITS[i, part_of]
            values = [loss.sum(), tokens.sum(), MEAN_LOGITS[i, part_of].sum(), logit.max()]
            if empty:
                values = [0.0, 0.0, 0.0, -np.inf]
            record.append(torch.tensor(values, dtype=torch.float32))
    return record.reduce(), record.reduce()


@pytest.mark.parametrize(
    ("world_size", "pipeline", "context"),
    [(1, 1, 1), (2, 1, 1), (2, 1, 2), (4, 1, 2), (4, 2, 1), (4, 2, 2), (4, 1, 1)],
)
def test_values_of_a_step(ranks: RankPools, world_size: int, pipeline: int, context: int) -> None:
    results = ranks.run(reduce, pipeline, context, world_size=world_size)
    last_stage = results[world_size - world_size // pipeline :]
    assert all(first == {} for first, _ in results[: world_size - len(last_stage)])
    for values, again in last_stage:
        assert values == pytest.approx(expected(), rel=1e-6, abs=0)
        assert again == {}


def refusal(rank: int, world_size: int) -> str:
    try:
        reduce(rank, world_size, 1, 1, True)
    except TrinityError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_without_tokens_is_an_error_on_every_rank(ranks: RankPools, world_size: int) -> None:
    refused = ranks.run(refusal, world_size=world_size)
    assert len(refused) == world_size
    assert all(line.startswith("no token of this step carries a loss") for line in refused)
