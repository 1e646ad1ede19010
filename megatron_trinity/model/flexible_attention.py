"""Causal attention in windows and documents by torch's flexible attention: one kernel, which skips
the blocks of keys that no query of a block sees and keeps no scores.

Queries are the last tokens of the keys, as in `attention.py`.

Shapes: s queries, b batch, n query heads, g key/value heads, d head_dim, p keys ahead of the first
query, B = 128 tokens of a block, q and k blocks of queries and of keys.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._triton import has_triton

BLOCK = 128
HEAD_DIMS = (16, 32, 64, 128, 256)
SHAPES = 64
"""Kernels that are compiled at most: one for each number of queries and keys, in training and in
evaluation. Past it torch raises an error."""


def is_flexible(query: Tensor) -> bool:
    """Whether torch has the kernel for `[b, n, s, d]` queries; elsewhere it would hold all scores.

    In fp32 it could round products to TF32, and of few queries it has no gradients.
    """
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[2] >= BLOCK
        and query.shape[3] in HEAD_DIMS
        and bool(has_triton())
    )


def flexible_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: BlockMask
) -> Tensor:
    """Attention with grouped queries under a block mask, `[b, n, s, d]`.

    Args:
        query: `[b, n, s, d]`; key, value: `[b, g, p + s, d]`.
        scale: factor on the logits.
        mask: what `document_mask` or `window_mask` gives for these sizes.
    """
    with torch._dynamo.config.patch(recompile_limit=SHAPES):
        result: Tensor = kernel()(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
    return result


@cache
def kernel(backend: str = "inductor") -> Any:
    """Compiled at its first call with a shape; another mask of that shape is an argument."""
    return torch.compile(flex_attention, backend=backend, dynamic=False, fullgraph=True)


@lru_cache(maxsize=16)
def window_mask(
    batch: int, length: int, keys: int, window: int | None, device: torch.device
) -> BlockMask:
    """Of whole sequences; made once."""
    starts = torch.zeros(batch, length, dtype=torch.int64, device=device)
    return document_mask(starts, keys, window)


@torch.no_grad()
def document_mask(starts: Tensor, keys: int, window: int | None) -> BlockMask:
    """Which blocks of keys the queries see, without a mask of tokens and without a host sync.

    A query sees the keys from its lowest to itself, and neither end moves back from one query to
    the next. So a block of queries sees the keys from the lowest of its first query to its last
    query, and all of them those from the lowest of the last query to the first query.

    Args:
        starts: `[b, s]` int64, the first key of each query's document, not decreasing.
        keys: p + s.
        window: W, or None for all keys.
    """
    length = starts.shape[1]
    previous = keys - length
    position = torch.arange(previous, keys, device=starts.device)
    lowest = starts if window is None else torch.maximum(starts, position - (window - 1))
    rows = torch.arange(0, length, BLOCK, device=starts.device)
    last = (rows + BLOCK - 1).clamp(max=length - 1)
    begin = torch.arange(0, keys, BLOCK, device=starts.device)  # [k]
    end = begin + BLOCK - 1
    seen = (end >= lowest[:, rows, None]) & (begin <= (last + previous)[:, None])  # [b, q, k]
    whole = (begin >= lowest[:, last, None]) & (end <= (rows + previous)[:, None])
    whole &= (rows + BLOCK <= length)[:, None]  # as torch has it for the rows behind the last
    lowest, position = lowest.int(), position.int()

    def sees(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column >= lowest[b, row]) & (column <= position[row])

    return BlockMask.from_kv_blocks(
        *_in_order(seen & ~whole),
        *_in_order(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(length, keys),
    )


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """`[b, q, k]` bool to how many each row has, `[b, 1, q]`, and which, first, `[b, 1, q, k]`."""
    dense = blocks.unsqueeze(1).int()
    which = dense.argsort(dim=-1, descending=True, stable=True)
    return dense.sum(dim=-1, dtype=torch.int32), which.int()
