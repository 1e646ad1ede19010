"""What the model is given of a sample: tokens, labels, which of them count, and its documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_trinity.data.corpus import Corpus
from megatron_trinity.data.packing import Piece
from megatron_trinity.errors import DataError


@lru_cache(maxsize=4)
def _positions(size: int) -> Tensor:
    return torch.arange(size)


@dataclass(frozen=True)
class SampleFormat:
    """How samples are made.

    Attributes:
        seq_length: s, tokens of a sample.
        vocab_size: tokens that the model has an embedding for.
        masking: documents are kept apart.
        unseen_labels: tokens that carry no loss as labels, such as padding inside documents.
        unseen_tokens: tokens that carry no loss as inputs, such as the end of a document.
    """

    seq_length: int
    vocab_size: int
    masking: bool = False
    unseen_labels: tuple[int, ...] = ()
    unseen_tokens: tuple[int, ...] = ()

    def sample(self, corpus: Corpus, pieces: Sequence[Piece]) -> dict[str, Tensor]:
        """Tokens of `pieces`, `seq_length + 1` of them or, with padding behind, fewer.

        Returns: `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (fp32), `[s]`. With
            masking also `cu_seqlens`, `[s + 1]` int32, cumulative lengths that end in the number
            of tokens ahead of the padding over and over, and `max_seqlen`; a document's last token
            then carries no loss, since its label is of another document.

        Raises:
            DataError: a token that the model has no embedding for.
        """
        size = self.seq_length
        row = np.zeros(size + 1, dtype=np.int64)
        ends = []
        end = 0
        for piece in pieces:
            corpus.read(piece, row[end : end + piece.length])
            end += piece.length
            ends.append(end)
        if row.view(np.uint64).max() >= self.vocab_size:  # one below 0 is large then
            self._refuse(corpus, pieces, row)
        text = torch.from_numpy(row)
        tokens, labels = text[:-1], text[1:]
        mask = torch.ones(size)
        if end < size + 1:
            mask[max(end - 1, 0) :] = 0.0
        for token in self.unseen_labels:
            mask[labels == token] = 0.0
        for token in self.unseen_tokens:
            mask[tokens == token] = 0.0
        sample = {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": mask,
            "position_ids": _positions(size),
        }
        if self.masking:
            # The last token of a row is a label alone, and may be all that there is of a document.
            borders = [border for border in ends if border < size + 1]
            mask[[border - 1 for border in borders]] = 0.0
            cumulative = torch.full((size + 1,), min(end, size), dtype=torch.int32)
            starts = torch.tensor([0, *(b for b in borders if b < size)], dtype=torch.int32)
            cumulative[: len(starts)] = starts
            sample |= {
                "cu_seqlens": cumulative,
                "max_seqlen": cumulative.diff().max(),
            }
        return sample

    def padding(self) -> dict[str, Tensor]:
        """A sample that carries no loss."""
        return self.sample(Corpus(()), ())

    def _refuse(
        self,
        corpus: Corpus,
        pieces: Sequence[Piece],
        row: NDArray[np.int64],
    ) -> None:
        place = int(np.argmax((row < 0) | (row >= self.vocab_size)))
        begin = 0
        for piece in pieces:
            if place < begin + piece.length:
                raise DataError(
                    f"{corpus.named(piece.document)} has token {row[place]}, the model "
                    f"{self.vocab_size} tokens; prepare it with the tokenizer of this run"
                )
            begin += piece.length
