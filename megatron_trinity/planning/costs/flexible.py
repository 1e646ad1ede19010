"""Flexible attention as a GPU has it: a launch forward and two backward, which keep no scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from megatron_trinity.planning.costs.operations import one_launch

NAME = "flex_attention"


def flexible(
    query: Tensor, key: Tensor, value: Tensor, *, block_mask: BlockMask, scale: float, **_: Any
) -> Tensor:
    """As torch's `flex_attention` with grouped queries, through all scores."""
    result: Tensor = _Flexible.apply(query, key, value, block_mask, scale)
    return result


class _Flexible(torch.autograd.Function):
    """Keeps what the kernels keep: what goes in, what comes out, and a number a query."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float
    ) -> Tensor:
        result: Tensor
        result, log_sum = one_launch(NAME, attend)(query, key, value, mask, scale)
        ctx.save_for_backward(query, key, value, result, log_sum)
        ctx.mask, ctx.scale = mask, scale
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        counted = one_launch(f"{NAME}_backward", attend_backward, lambda *_: 2)
        return *counted(gradient, *ctx.saved_tensors, ctx.mask, ctx.scale), None, None


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    """The result `[b, n, s, d]`, and the logsumexp of each query's scores `[b, n, s, 1]`."""
    scores = _scores(query, key, mask, scale)
    log_sum = scores.logsumexp(-1, keepdim=True)
    result = (scores - log_sum).exp() @ _of_queries(value, query)
    return result.to(query.dtype), log_sum


def attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    result: Tensor,
    log_sum: Tensor,
    mask: BlockMask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries, keys and values."""
    weights = (_scores(query, key, mask, scale) - log_sum).exp()
    g = gradient.float()
    along = (g * result.float()).sum(-1, keepdim=True)
    of_scores = weights * (g @ _of_queries(value, query).mT - along) * scale
    groups = (key.shape[1], -1)
    of_key, of_value = (
        part.unflatten(1, groups).sum(2) for part in (of_scores.mT @ query.float(), weights.mT @ g)
    )
    of_query = of_scores @ _of_queries(key, query)
    return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)


def _scores(query: Tensor, key: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """`[b, n, s, t]` fp32, of t keys."""
    scores = query.float() @ _of_queries(key, query).mT * scale
    batch, _, length, keys = scores.shape
    seen = create_mask(mask.mask_mod, batch, 1, length, keys, device=query.device)
    return scores.masked_fill(~seen, -torch.inf)


def _of_queries(tensor: Tensor, query: Tensor) -> Tensor:
    """A key or value head for each head of the queries, `[b, n, t, d]` fp32."""
    return tensor.float().repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)
