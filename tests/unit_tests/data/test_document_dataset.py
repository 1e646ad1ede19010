"""Samples of documents that are kept apart: the loss at their borders, and what the model is told.

Every token of a document is the document's number, so that a label of another document is one that
differs from its token.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from tests.distributed.pool import RankPools

LENGTH = 8
# One token; as long as a sample; longer; and ends exactly where a sample ends, whatever the order.
DOCUMENTS = [1, 8, 16, 3, 5, 2, 6, 1, 1, 24, 8, 7, 1, 40, 8, 4, 4, 1, 9]


def samples(rank: int, world_size: int, prefix: Path) -> list[dict[str, Any]]:
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )

    from megatron_trinity.data.document_dataset import DocumentDataset

    config = GPTDatasetConfig(
        random_seed=5,
        sequence_length=LENGTH,
        blend_per_split=[([str(prefix)], None), None, None],
        tokenizer=SimpleNamespace(eod=0, pad=-1, vocab_size=100, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        inter_document_masking=True,
    )
    builder = BlendedMegatronDatasetBuilder(
        DocumentDataset, [None, None, None], lambda: True, config
    )
    train, _, _ = builder.build()
    return [train[index] for index in range(len(train))]


@pytest.fixture(scope="module")
def given(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    prefix = tmp_path_factory.mktemp("documents") / "data"
    builder = IndexedDatasetBuilder(
        f"{prefix}.bin", dtype=DType.optimal_dtype(100), multimodal=False
    )
    for number, length in enumerate(DOCUMENTS, start=1):
        builder.add_document(torch.full((length,), number), [length])
    builder.finalize(f"{prefix}.idx")
    [got] = ranks.run(samples, prefix, world_size=1)
    return got


def test_a_token_carries_loss_where_its_label_is_of_its_document(
    given: list[dict[str, Any]],
) -> None:
    assert len(given) == (sum(DOCUMENTS) - 1) // LENGTH
    at_the_end = 0
    for sample in given:
        same = sample["tokens"] == sample["labels"]
        assert torch.equal(sample["loss_mask"], same.float())
        at_the_end += int(not same[-1])
    # Documents that end exactly with their sample, which `cu_seqlens` alone do not show.
    assert at_the_end > 1


def test_documents_are_told_by_cumulative_lengths(given: list[dict[str, Any]]) -> None:
    one_token = 0
    for sample in given:
        borders = (torch.nonzero(sample["tokens"].diff()) + 1).flatten().tolist()
        expected = [0, *borders, LENGTH]
        assert sample["cu_seqlens"].dtype == torch.int32
        assert sample["cu_seqlens"].shape == (LENGTH + 1,)
        assert sample["cu_seqlens"].unique().tolist() == expected
        one_token += any(b - a == 1 for a, b in pairwise(expected))
    assert one_token > 1


def test_samples_do_not_share_a_mask(given: list[dict[str, Any]]) -> None:
    masks = {tuple(sample["loss_mask"].tolist()) for sample in given}
    assert len(masks) > 3
