"""Cross entropy over a vocabulary that is split over tensor-parallel ranks, and what z-loss needs.

Megatron's `vocab_parallel_cross_entropy` keeps the logsumexp to itself. Here the same passes over
the logits and one collective less give it as well, with the largest and the mean logit, which tell
whether logits drift (the report's reason for a z-loss).

Shapes: s sequence length, b micro-batch, v vocabulary (padded), tp tensor-parallel ranks.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Row(IntEnum):
    """What `TrinityModel` returns of each token, by its index in the leading axis."""

    CROSS_ENTROPY = 0
    LOG_SUM_EXP = 1
    LARGEST_LOGIT = 2
    MEAN_LOGIT = 3


class TokenLosses(NamedTuple):
    """Values of each token, all `[s, b]`, in the order of `Row`.

    fp32, or the dtype of the logits if that is wider. The same on every tensor-parallel rank.
    """

    cross_entropy: Tensor  # nats
    log_sum_exp: Tensor
    largest_logit: Tensor  # no gradient
    mean_logit: Tensor  # no gradient

    def stacked(self) -> Tensor:
        """`[4, b, s]`: batch first, as Megatron's loss functions take it."""
        return torch.stack(self).transpose(1, 2).contiguous()


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, vocab_size: int, group: dist.ProcessGroup
) -> TokenLosses:
    """Cross entropy, logsumexp, largest and mean logit of each token, without gathering logits.

    Everything is over the true vocabulary. How much it is padded depends on the number of ranks,
    and Megatron's own function counts the padding as ordinary logits; without padding the cross
    entropy is that of its function, to the last bit but for the order in which a backend adds up
    ranks.

    As with Megatron's function, the buffer of fp32 logits is used up (they are overwritten), and
    there can be one backward pass.

    Args:
        logits: `[s, b, v/tp]`, this rank's part; computed with in fp32 at least.
        labels: `[s, b]` int64, indices into the whole vocabulary.
        vocab_size: the true width, at most v.
        group: the tensor-parallel group.
    """
    return TokenLosses(*_VocabParallelCrossEntropy.apply(logits, labels, vocab_size, group))


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, ...]:
        ctx.dtype = logits.dtype
        # A copy if logits are narrower; else the buffer that is reused from here on.
        x = logits.to(torch.promote_types(logits.dtype, torch.float32))
        width = x.size(-1)
        start = group.rank() * width
        true_width = min(max(vocab_size - start, 0), width)

        x[..., true_width:] = -torch.inf  # padding: no share in the sums, and no gradient
        highest = x.amax(-1, keepdim=True)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)

        logit_sum = x[..., :true_width].sum(-1)
        x.sub_(highest)
        local = labels - start
        here = (local >= 0) & (local < width)
        local = local.masked_fill(~here, 0).unsqueeze(-1)
        target = x.gather(-1, local).squeeze(-1).masked_fill(~here, 0)
        x.exp_()
        sums = torch.stack([x.sum(-1), target, logit_sum])
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        exp_sum, target, logit_sum = sums

        # Divided by its sum in the backward pass only, where a factor is due anyway.
        ctx.save_for_backward(x, exp_sum, local, here)
        log_sum = exp_sum.log()
        cross_entropy = log_sum - target
        largest = highest.squeeze(-1)
        mean = logit_sum / vocab_size
        ctx.mark_non_differentiable(largest, mean)
        return cross_entropy, log_sum + largest, largest, mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """softmax * (g_ce + g_lse) - onehot * g_ce, in the place of the exponentials."""
        of_cross_entropy, of_log_sum_exp = gradients[: Row.LARGEST_LOGIT]
        x, exp_sum, local, here = ctx.saved_tensors
        x.mul_(((of_cross_entropy + of_log_sum_exp) / exp_sum).unsqueeze(-1))
        x.scatter_add_(-1, local, -(of_cross_entropy * here).unsqueeze(-1))
        return x.to(ctx.dtype), None, None, None
