"""Megatron's random documents kept apart, with the loss mask that this needs."""

from __future__ import annotations

from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import MockGPTDataset


class MockDocumentDataset(MockGPTDataset):
    """Takes the loss from the last token of a document: its label belongs to the next document.

    Megatron's dataset gives the documents of a sample as `cu_seqlens`. Whether the last one ends
    with the sample cannot be told from them, since they leave out the token behind the sample,
    which is the last label; the lengths that the dataset reads have it.
    """

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[Any, Any, list[int]]:
        text, documents, lengths = super()._query_document_sample_shuffle_indices(idx)
        self._lengths = list(lengths)  # the caller changes its own
        return text, documents, lengths

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        sample = super().__getitem__(idx)
        ends = np.cumsum(self._lengths[:-1]) - 1
        mask = sample["loss_mask"].clone()  # the dataset keeps the original for all samples
        mask[ends] = 0.0
        return {**sample, "loss_mask": mask}
