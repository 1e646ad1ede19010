"""Samples of documents that are kept apart: the loss at their borders, and what the model is told.

Every token of a document is the document's number, so that a label of another document is one that
differs from its token.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_trinity.data.corpus import Corpus, Part
from megatron_trinity.data.packing import Piece, SequentialPacking
from megatron_trinity.data.samples import SampleFormat
from megatron_trinity.errors import DataError

LENGTH = 8
# One token; as long as a sample; longer; and ends exactly where a sample ends, whatever the order.
DOCUMENTS = [1, 8, 16, 3, 5, 2, 6, 1, 1, 24, 8, 7, 1, 40, 8, 4, 4, 1, 9]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("documents") / "data"
    builder = IndexedDatasetBuilder(
        f"{prefix}.bin", dtype=DType.optimal_dtype(100), multimodal=False
    )
    for number, length in enumerate(DOCUMENTS, start=1):
        builder.add_document(torch.full((length,), number), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


def pass_over(prefix: Path, layout: SampleFormat) -> list[dict[str, Any]]:
    corpus = Corpus([Part(str(prefix))])
    packing = SequentialPacking(corpus.lengths, layout.seq_length, 5)
    return [layout.sample(corpus, packing.pieces(n)) for n in range(sum(DOCUMENTS) // LENGTH)]


@pytest.fixture(scope="module")
def given(prefix: Path) -> list[dict[str, Any]]:
    return pass_over(prefix, SampleFormat(LENGTH, 100, masking=True))


def test_a_token_carries_loss_where_its_label_is_of_its_document(
    given: list[dict[str, Any]],
) -> None:
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


def test_without_masking_every_token_carries_loss(prefix: Path) -> None:
    for sample in pass_over(prefix, SampleFormat(LENGTH, 100)):
        assert sample["loss_mask"].tolist() == [1.0] * LENGTH
        assert sorted(sample) == ["labels", "loss_mask", "position_ids", "tokens"]


def test_tokens_and_labels_follow_each_other(prefix: Path) -> None:
    corpus = Corpus([Part(str(prefix))])
    layout = SampleFormat(LENGTH, 100, unseen_labels=(3,), unseen_tokens=(5,))
    sample = layout.sample(corpus, [Piece(1, 5, 3), Piece(2, 0, 2), Piece(4, 0, 4)])
    assert sample["tokens"].tolist() == [2, 2, 2, 3, 3, 5, 5, 5]
    assert sample["labels"].tolist() == [2, 2, 3, 3, 5, 5, 5, 5]
    assert sample["loss_mask"].tolist() == [1, 1, 0, 0, 1, 0, 0, 0]


def test_padding_carries_no_loss_and_is_a_document_of_its_own(prefix: Path) -> None:
    corpus, layout = Corpus([Part(str(prefix))]), SampleFormat(LENGTH, 100, masking=True)
    sample = layout.sample(corpus, [Piece(1, 0, 2), Piece(2, 0, 3)])
    assert sample["tokens"].tolist() == [2, 2, 3, 3, 3, 0, 0, 0]
    assert sample["loss_mask"].tolist() == [1, 0, 1, 1, 0, 0, 0, 0]
    assert sample["cu_seqlens"].tolist() == [0, 2, *[5] * (LENGTH - 1)]
    assert layout.padding()["loss_mask"].sum() == 0
    assert layout.padding()["cu_seqlens"].tolist() == [0] * (LENGTH + 1)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_the_lengths_end_where_padding_begins(prefix: Path, missing: int) -> None:
    """A row lacks its look-ahead alone, or also its last token."""
    corpus, layout = Corpus([Part(str(prefix))]), SampleFormat(LENGTH, 100, masking=True)
    sample = layout.sample(corpus, [Piece(2, 0, 3), Piece(9, 0, LENGTH - 2 - missing)])
    ahead = min(LENGTH, LENGTH + 1 - missing)
    assert sample["cu_seqlens"].tolist() == [0, 3, *[ahead] * (LENGTH - 1)]
    assert sample["max_seqlen"] == ahead - 3


def test_a_share_and_several_datasets_are_numbered_through(prefix: Path) -> None:
    corpus = Corpus([Part(str(prefix), 0.0, 0.5), Part(str(prefix), 0.5, 1.0), Part(str(prefix))])
    assert corpus.lengths.tolist() == DOCUMENTS * 2
    assert corpus.documents == 2 * len(DOCUMENTS)
    assert corpus.tokens == 2 * sum(DOCUMENTS)
    for document in range(corpus.documents):
        read = np.zeros(DOCUMENTS[document % len(DOCUMENTS)], dtype=np.int64)
        corpus.read(Piece(document, 0, len(read)), read)
        assert set(read.tolist()) == {document % len(DOCUMENTS) + 1}
    assert corpus.named(len(DOCUMENTS) + 3) == f"document 3 of {prefix}"


def test_a_token_without_an_embedding_is_named(prefix: Path) -> None:
    with pytest.raises(DataError) as refused:
        pass_over(prefix, SampleFormat(LENGTH, len(DOCUMENTS)))
    assert f"document 18 of {prefix} has token 19, the model 19 tokens" in str(refused.value)
    behind_a_traceback = f"Caught DataError in worker 0.\nTraceback\nx.DataError: {refused.value}\n"
    assert str(DataError(behind_a_traceback)) == str(refused.value)
