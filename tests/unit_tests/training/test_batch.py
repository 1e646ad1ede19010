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
CU_SEQLENS = torch.tensor([[0, 2, 5, 6, 6, 6, 6], [0, 6, 6, 6, 6, 6, 6]], dtype=torch.int32)


def sample(padded: bool = False) -> dict[str, Tensor]:
    tokens = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
    return {
        "tokens": tokens,
        "labels": tokens + 1,
        "loss_mask": (tokens % 3 != 0).float(),
        "position_ids": torch.arange(LENGTH).expand(BATCH, LENGTH).contiguous(),
        "cu_seqlens": CU_SEQLENS.clamp(max=5 if padded else LENGTH),
        "max_seqlen": torch.tensor([3, 6], dtype=torch.int32),
    }


def receive(
    rank: int,
    world_size: int,
    tensor: int,
    pipeline: int,
    data: bool = True,
    masking: bool = False,
    context: int = 1,
    padded: bool = False,
) -> dict[str, Any] | str:
    from megatron.core import parallel_state
    from megatron.training.global_vars import set_args

    from megatron_trinity.training.batch import next_batch

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
    )
    set_args(
        Namespace(
            context_parallel_size=context,
            dataloader_inter_document_masking=masking,
            padded_rows=padded,
            micro_batch_size=BATCH,
            eval_micro_batch_size=BATCH,
            seq_length=LENGTH,
            pipeline_model_parallel_size=pipeline,
        )
    )
    reads = data and parallel_state.get_tensor_model_parallel_rank() == 0
    try:
        return next_batch(iter([sample(padded)]) if reads else None, vp_stage=None)
    except RuntimeError as error:
        return str(error)


def check(got: Any, present: list[str]) -> None:
    expected = sample()
    assert sorted(got) == ["documents", *KEYS]
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


@pytest.mark.parametrize(("tensor", "pipeline", "context"), [(1, 4, 1), (2, 2, 1), (2, 1, 3)])
def test_every_stage_gets_the_documents(
    ranks: RankPools, tensor: int, pipeline: int, context: int
) -> None:
    batches = ranks.run(
        receive, tensor, pipeline, True, True, context, world_size=tensor * pipeline * context
    )
    for batch in batches:
        assert isinstance(batch, dict)
        documents = batch["documents"]
        assert documents.ids.tolist() == [[0, 0, 1, 1, 1, 2], [3] * 6]
        assert documents.starts.tolist() == [[0, 0, 2, 2, 2, 5], [0] * 6]
        assert documents.lengths.tolist() == [2, 3, 1, 6]
        assert documents.padding is None


def test_every_stage_knows_what_is_padding(ranks: RankPools) -> None:
    for batch in ranks.run(receive, 2, 2, True, True, 1, True, world_size=4):
        assert isinstance(batch, dict)
        documents = batch["documents"]
        assert documents.padding.tolist() == [[False] * 5 + [True]] * 2
        assert documents.ids.tolist() == [[0, 0, 1, 1, 1, 2], [3] * 5 + [4]]


def test_context_parallel_ranks_get_two_chunks_each(ranks: RankPools) -> None:
    batches = ranks.run(receive, 1, 1, True, False, 3, world_size=3)
    for rank, batch in enumerate(batches):
        assert isinstance(batch, dict)
        for key in KEYS:
            assert torch.equal(batch[key], sample()[key][:, [rank, 5 - rank]])
