"""The sequence-wise auxiliary loss (report, eq. 29-32).

A document that shares its sequence with others under intra-document masking is a sequence of its
own.

Shapes: s tokens of a sequence on this rank, b sequences, E experts, k experts per token, T tokens
of a sequence over all ranks that hold a part of it, D documents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class RoutedDocuments(NamedTuple):
    """The documents of the tokens that a router gets.

    Padding behind the documents of a sequence is a document as well, with a length, and counts for
    nothing.
    """

    ids: Tensor  # `[s, b]` int64, the document of each token on this rank
    lengths: Tensor  # `[D]` int64, tokens over all ranks
    counted: Tensor  # `[D]` int64, the same, 0 for padding
    shares: Tensor  # `[D]` fp32, of the tokens of its sequence, 0 for padding


def sequence_balance_loss(
    logits: Tensor, chosen: Tensor, topk: int, group: dist.ProcessGroup | None
) -> Tensor:
    """sum_i f_i P_i of each sequence, this rank's part of it.

    f_i = E / (k T) * tokens of the sequence that chose expert i (over biased scores; no gradient);
    P_i = 1 / T * sum over its tokens of s_i / sum_j s_j (unbiased scores, normalised over all E).

    Args:
        logits: `[s, b, E]` fp32.
        chosen: `[s, b, E]` bool, k experts per token.
        topk: k.
        group: the ranks over which a sequence is spread; None if it is whole here.
    Returns: `[b]` fp32; added up over the group it is the loss, 1 if the load is even.
    """
    ranks = 1 if group is None else group.size()
    length = logits.new_full((logits.shape[1], 1), logits.shape[0] * ranks)
    return _loss(chosen.sum(dim=0), normalized_scores(logits).sum(dim=0), length, topk, group)


def document_balance_loss(
    logits: Tensor,
    chosen: Tensor,
    topk: int,
    group: dist.ProcessGroup | None,
    ids: Tensor,
    lengths: Tensor,
) -> Tensor:
    """As `sequence_balance_loss`, of each document.

    Args:
        ids: `[s, b]` int64, the document of each token on this rank.
        lengths: `[D]` int64, tokens of each document over all ranks.
    Returns: `[D]` fp32.
    """
    ids, experts = ids.flatten(), logits.shape[-1]
    counts = chosen.new_zeros((len(lengths), experts), dtype=torch.int64)
    counts.index_add_(0, ids, chosen.flatten(0, 1).long())
    scores = logits.new_zeros((len(lengths), experts))
    scores = scores.index_add(0, ids, normalized_scores(logits).flatten(0, 1))
    return _loss(counts, scores, lengths.to(logits.dtype).unsqueeze(1), topk, group)


def normalized_scores(logits: Tensor) -> Tensor:
    """s_i / sum_j s_j of sigmoid scores; the logarithm does not saturate where the sigmoid does."""
    return torch.softmax(F.logsigmoid(logits), dim=-1)


def _loss(
    counts: Tensor, scores: Tensor, length: Tensor, topk: int, group: dist.ProcessGroup | None
) -> Tensor:
    """From `[n, E]` int64 counts and sums of scores of this rank, and `[n, 1]` lengths."""
    if group is not None and group.size() > 1:
        dist.all_reduce(counts, group=group)
    share = counts.to(scores.dtype) * (counts.shape[-1] / (topk * length))
    return (share * scores / length).sum(dim=-1)
