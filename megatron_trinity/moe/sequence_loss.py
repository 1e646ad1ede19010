"""The sequence-wise auxiliary loss (report, eq. 29-32).

Shapes: s tokens of a sequence on this rank, b sequences, E experts, k experts per token, T tokens
of a sequence over all ranks that hold a part of it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


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
    tokens, _, experts = logits.shape
    counts = chosen.sum(dim=0)  # [b, E] int64
    if group is not None and group.size() > 1:
        dist.all_reduce(counts, group=group)
        tokens *= group.size()
    share = counts.to(logits.dtype) * (experts / (topk * tokens))
    # The logarithm of the sigmoid does not saturate where the sigmoid does.
    probabilities = torch.softmax(F.logsigmoid(logits), dim=-1).sum(dim=0) / tokens  # [b, E]
    return (share * probabilities).sum(dim=-1)
