"""A micro-batch reaches the ranks that need it, and no others."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.pool import RankPools

BATCH, LENGTH = 2, 6
KEYS = ["labels", "loss_mask", "position_ids", "tokens"]


def sample() -> dict[str, Tensor]:
    tokens = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
    return {
        "tokens": tokens,
        "labels": tokens + 1,
        "loss_mask": (tokens % 3 != 0).float(),
        "position_ids": torch.arange(LENGTH).expand(BATCH, LENGTH).contiguous(),
    }


def receive(
    rank: int, world_size: int, tensor: int, pipeline: int, data: bool = True
) -> dict[str, Tensor | None] | str:
    from megatron.core import parallel_state
    from megatron.training.global_vars import set_args

    from megatron_trinity.training.batch import next_batch

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline
    )
    set_args(
        Namespace(
            context_parallel_size=1,
            micro_batch_size=BATCH,
            eval_micro_batch_size=BATCH,
            seq_length=LENGTH,
            pipeline_model_parallel_size=pipeline,
        )
    )
    reads = data and parallel_state.get_tensor_model_parallel_rank() == 0
    try:
        return next_batch(iter([sample()]) if reads else None, vp_stage=None)
    except RuntimeError as error:
        return str(error)


def check(got: Any, present: list[str]) -> None:
    expected = sample()
    assert sorted(got) == KEYS
    assert sorted(key for key, tensor in got.items() if tensor is not None) == present
    for key in present:
        assert torch.equal(got[key], expected[key]), key
        assert got[key].dtype == expected[key].dtype


def test_one_rank_gets_everything(ranks: RankPools) -> None:
    [batch] = ranks.run(receive, 1, 1, world_size=1)
    check(batch, KEYS)


def test_tensor_parallel_ranks_share_one_batch(ranks: RankPools) -> None:
    for batch in ranks.run(receive, 2, 1, world_size=2):
        check(batch, KEYS)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 4), (2, 2)])
def test_pipeline_stages_get_what_they_use(ranks: RankPools, tensor: int, pipeline: int) -> None:
    batches = ranks.run(receive, tensor, pipeline, world_size=4)
    for rank, batch in enumerate(batches):
        stage = rank // tensor
        assert isinstance(batch, dict)
        if stage == 0:
            assert batch["tokens"] is not None
            assert torch.equal(batch["tokens"], sample()["tokens"])
        elif stage == pipeline - 1:
            assert batch["labels"] is not None
            assert batch["loss_mask"] is not None
            assert torch.equal(batch["labels"], sample()["labels"])
            assert torch.equal(batch["loss_mask"], sample()["loss_mask"])
        else:
            check(batch, [])


def test_a_reading_rank_without_data_is_told(ranks: RankPools) -> None:
    [message] = ranks.run(receive, 1, 1, False, world_size=1)
    assert message == "tensor-parallel rank 0 of this pipeline stage has no data"
