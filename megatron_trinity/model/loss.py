"""LM head, cross entropy and what z-loss needs, without the logits of a whole micro-batch.

The vocabulary is split over tensor-parallel ranks. Logits are computed, used and forgotten in
pieces, none of them larger than the logits of a chunk of tokens, forward and backward. What is kept
for the backward pass is two numbers a token, with which it computes the same logits again:

- Forward, a chunk of tokens and all of the rank's vocabulary at a time, so that each token's sums
  are those of undivided logits. The ranks' sums are put together once, behind the last chunk: two
  collectives, however many chunks there are.
- Backward, all tokens and a block of the vocabulary at a time. A block's rows of the weight's
  gradient are then a single product, rounded once, and written or accumulated where Megatron wants
  them. By chunks of tokens, each chunk would add to the whole matrix, in fp32 for the precision of
  one product: 4 bytes a weight more. What is added up over blocks is the gradient of the hidden
  states, in fp32, which is small.

To compute logits again costs a third more in the head (a product of the forward pass to the three
of both). Gradients in the forward pass would not: but the factors of a token's cross entropy and
logsumexp (its mask, z-loss's coefficient and 2 logsumexp) are known behind it alone, and the
gradient of the weight, a sum over tokens, would be kept in the meantime, as large as the weight.
With one chunk, all logits fit into what a chunk may hold: they are kept, and nothing is computed
twice.

What happens to the logits between the products is compiled where there is Triton (`fused_loss.py`),
without an fp32 copy of them: a chunk is 7 launches then, and 29 elsewhere.

Shapes: n tokens, s sequence length, b micro-batch, h hidden size, v vocabulary (padded), tp
tensor-parallel ranks.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_trinity.model import compiling
from megatron_trinity.model.fused_loss import fused_gradient, fused_statistics, is_fused, within
from megatron_trinity.model.weight_gradient import WeightGradient

BYTES_AT_ONCE = 850 * 2**20
"""What a chunk's logits and all that is made of them take, if its length is not given."""

ALIGNED = 8
"""Blocks of the vocabulary are multiples of it: 16 bytes of bf16, for the kernels of products."""


class Row(IntEnum):
    """What `token_losses` gives of each token, and the model, by its index in the leading axis."""

    CROSS_ENTROPY = 0
    LOG_SUM_EXP = 1
    LARGEST_LOGIT = 2
    MEAN_LOGIT = 3


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup,
    *,
    chunk_size: int | None = None,
    into_main_grad: bool = False,
) -> Tensor:
    """Cross entropy, logsumexp, largest and mean logit of each token; no gradient of the last two.

    Everything is over the true vocabulary. How much it is padded depends on the number of ranks,
    and Megatron's own function counts the padding as ordinary logits; without padding the cross
    entropy is that of its function. Logits have the dtype of the hidden states, and are computed
    with in fp32 at least.

    The gradient of the hidden states is this rank's part, to be added up over the group. With one
    chunk there can be one backward pass, since it is computed in the place of what was kept.

    Args:
        hidden: `[s, b, h]`, the same on all ranks.
        weight: `[v/tp, h]`, this rank's rows of the LM head.
        labels: `[s, b]` int64, indices into the whole vocabulary.
        vocab_size: the true width, at most v.
        group: the tensor-parallel group.
        chunk_size: tokens whose logits are held at once; 0 for all of them, None for chunks of
            one size, as few as `BYTES_AT_ONCE` allows.
        into_main_grad: see `WeightGradient`.
    Returns: `[4, s, b]` in the order of `Row`, the same on every tensor-parallel rank; fp32, or the
        dtype of the logits if that is wider.
    """
    losses: Tensor = _TokenLosses.apply(
        hidden.flatten(0, 1),
        weight,
        labels.flatten(),
        vocab_size,
        group,
        chunk_length(labels.numel(), weight.size(0), chunk_size, bytes_of_logit(hidden)),
        into_main_grad,
    )
    return losses.view(-1, *labels.shape)


def bytes_of_logit(hidden: Tensor) -> int:
    """What is there at once of each logit: itself and its gradient, or a copy to compute with."""
    if is_fused(hidden):
        return 2 * hidden.element_size()
    working = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.element_size() + working.itemsize * (working != hidden.dtype)


def chunk_length(tokens: int, width: int, chunk_size: int | None, of_logit: int = 6) -> int:
    """Tokens of a chunk, of so many with `width` logits each; see `token_losses`.

    Args:
        of_logit: bytes of each logit and what is made of it.
    """
    if chunk_size is not None:
        return min(chunk_size or tokens, tokens)
    most = max(BYTES_AT_ONCE // of_logit // width, 1)
    number = max(-(-tokens // most), 1)
    return -(-tokens // number)


def blocks(width: int, number: int) -> list[slice]:
    """At most `number` slices that cover `width` rows."""
    size = -(-width // (number * ALIGNED)) * ALIGNED
    return [slice(start, min(start + size, width)) for start in range(0, width, size or 1)]


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocab_size: int,
        group: dist.ProcessGroup,
        chunk: int,
        into_main_grad: bool,
    ) -> Tensor:
        tokens = hidden.size(0)
        start = group.rank() * weight.size(0)
        # Rows that pad the vocabulary have no part in anything.
        true_width = min(max(vocab_size - start, 0), weight.size(0))

        fused = is_fused(hidden)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        x, parts = None, []
        for begin in range(0, tokens if true_width else 0, chunk):
            some = slice(begin, begin + chunk)
            x = None  # before the next one is made
            x, part = (fused_statistics if fused else statistics)(
                hidden[some] @ weight[:true_width].t(), labels[some], start, dtype
            )
            parts.append(part)
        if parts:
            largest, sums = torch.cat(parts, 1).split([1, 3])
            largest = largest[0]
        else:
            largest = torch.full((tokens,), -torch.inf, dtype=dtype, device=hidden.device)
            sums = largest.new_zeros(3, tokens)

        ours, ratio = largest, None
        if group.size() > 1:
            largest = ours.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
            ratio = torch.exp(ours - largest)
            sums[0].mul_(ratio)
            # A target is on one rank.
            dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        values, factors = compiling.fitting(results, largest)(largest, sums, ratio, vocab_size)
        kept = x if chunk >= tokens else None
        ctx.save_for_backward(hidden, weight, labels, ours, factors, kept)
        ctx.fused, ctx.start = fused, start
        ctx.width, ctx.chunks, ctx.into_main_grad = true_width, -(-tokens // chunk), into_main_grad
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, shift, factors, kept = ctx.saved_tensors
        both = gradients[: Row.LARGEST_LOGIT]  # of cross entropy and logsumexp
        of_hidden = None
        of_weight = WeightGradient(weight, ctx.into_main_grad) if ctx.needs_input_grad[1] else None
        for rows in blocks(ctx.width, ctx.chunks):
            some = weight[rows]
            arguments = (factors, both, labels, ctx.start + rows.start)
            if ctx.fused:
                x = hidden @ some.t() if kept is None else kept
                of_logits = fused_gradient(x, shift, *arguments)
            else:
                x = exponentials(hidden @ some.t(), shift) if kept is None else kept
                of_logits = gradient(x, *arguments).to(hidden.dtype)
            del x  # no more of them than a chunk has
            part = of_logits @ some
            of_hidden = part if of_hidden is None else of_hidden.to(factors.dtype).add_(part)
            if of_weight is not None:
                of_weight.add(rows, of_logits, hidden)
            del of_logits
        return (
            torch.zeros_like(hidden) if of_hidden is None else of_hidden.to(hidden.dtype),
            None if of_weight is None else of_weight.result(),
            *[None] * 5,
        )


def statistics(
    logits: Tensor, target: Tensor, first: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What a chunk's tokens need of their logits `[n, v]`.

    Args:
        target: `[n]` int64, indices into the whole vocabulary.
        first: index of the first logit.
    Returns: exp(logit - largest) `[n, v]`, in the place of the logits if they are of `dtype`, and
        in `dtype` `[4, n]`: the largest logit and the sums of exponentials, target and logits.
    """
    x = logits.to(dtype)
    del logits
    here, elsewhere = within(x, target, first)
    result = x.new_empty(4, len(x))
    largest, exp_sum, of_target, logit_sum = result
    torch.amax(x, -1, out=largest)
    torch.sum(x, -1, out=logit_sum)
    torch.gather(x, -1, here.unsqueeze(-1), out=of_target.unsqueeze(-1))
    of_target.masked_fill_(elsewhere, 0)
    x.sub_(largest.unsqueeze(-1)).exp_()
    torch.sum(x, -1, out=exp_sum)
    return x, result


def results(
    largest: Tensor, sums: Tensor, ratio: Tensor | None, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """What is made of the statistics of the whole vocabulary.

    Args:
        largest: `[n]`.
        sums: `[3, n]`, of exponentials, target and logits.
        ratio: `[n]`, what makes of an exponential of this rank one of the whole vocabulary; None
            for 1.
    Returns: `[4, n]`, rows as in `Row`, and `[n]`, what makes of an exponential a probability.
    """
    exp_sum, target, logit_sum = sums
    factors = exp_sum.reciprocal() if ratio is None else ratio / exp_sum
    log_sum = exp_sum.log()
    values = (log_sum - (target - largest), log_sum + largest, largest, logit_sum / vocab_size)
    return torch.stack(values), factors


def exponentials(logits: Tensor, shift: Tensor) -> Tensor:
    """exp(logit - shift) `[n, v]`, in the place of the logits if they have the dtype of `shift`."""
    return logits.to(shift.dtype).sub_(shift.unsqueeze(-1)).exp_()


def gradient(x: Tensor, factors: Tensor, both: Tensor, target: Tensor, first: int) -> Tensor:
    """softmax * (g_ce + g_lse) - onehot * g_ce, of a block of the vocabulary.

    Args:
        x: `[n, v]` exponentials; the result takes their place.
        factors: `[n]`, what makes of an exponential a probability.
        both: `[2, n]`, g_ce and g_lse.
        target: `[n]` int64, indices into the whole vocabulary.
        first: index of the block's first logit.
    """
    here, elsewhere = within(x, target, first)
    of_cross_entropy, of_log_sum_exp = both
    of_target = -of_cross_entropy.masked_fill(elsewhere, 0)
    x.mul_(((of_cross_entropy + of_log_sum_exp) * factors).unsqueeze(-1))
    return x.scatter_add_(-1, here.unsqueeze(-1), of_target.unsqueeze(-1))
