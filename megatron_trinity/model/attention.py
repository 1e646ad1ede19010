"""Attention on torch's scaled-dot-product attention: causal, or causal within a window, where the
tokens of a document see no other document.

Queries are the last tokens of the keys: of s queries and p + s keys, query i is key p + i. So the
same functions serve a whole sequence (p = 0) and a part of one.

Shapes: s queries, b batch, n query heads, g key/value heads (n a multiple of g), d head_dim, p keys
ahead of the first query, W window, c number of chunks of W queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 512
"""Queries that are masked at a time, so that no mask has more than ROWS x (p + s) elements."""


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, starts: Tensor | None = None
) -> Tensor:
    """Causal attention with grouped queries.

    Args:
        query: `[b, n, s, d]`; key, value: `[b, g, p + s, d]`, of one floating dtype.
        scale: factor on the logits, 1/sqrt(d) for Trinity.
        starts: `[b, s]` int64, the first key that a query may see; None for key 0.
    Returns: `[b, n, s, d]`.
    """
    previous = key.shape[2] - query.shape[2]
    if starts is None and previous == 0:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
    parts = []
    for first in range(0, query.shape[2], ROWS):
        rows = query[:, :, first : first + ROWS]
        end = previous + first + rows.shape[2]
        begin = 0 if starts is None else int(starts[:, first : first + ROWS].min())
        position = torch.arange(previous + first, end, device=query.device).unsqueeze(1)
        column = torch.arange(begin, end, device=query.device)
        mask = column <= position  # [rows, keys]
        if starts is not None:
            lowest = starts[:, first : first + ROWS, None]
            mask = (mask & (column >= lowest)).unsqueeze(1)  # [b, 1, rows, keys]
        parts.append(
            F.scaled_dot_product_attention(
                rows,
                key[:, :, begin:end],
                value[:, :, begin:end],
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )
        )
    return torch.cat(parts, dim=2)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    scale: float,
    starts: Tensor | None = None,
) -> Tensor:
    """Causal attention where token t sees the `window` keys t - window + 1 ... t (report, eq. 8).

    Queries are cut into chunks of `window` tokens; a chunk needs only its own keys and those of the
    chunk before it, so memory and work grow with s x W instead of s x s.

    Args and result as in `causal_attention`.
    """
    length, keys = query.shape[2], key.shape[2]
    if window >= keys:
        return causal_attention(query, key, value, scale, starts)
    if keys == length and starts is None:
        # The first chunk has no keys before it, so that all others share one mask.
        q, k, v = (tensor[:, :, :window] for tensor in (query, key, value))
        rest = window_attention(query[:, :, window:], key, value, window, scale)
        return torch.cat([causal_attention(q, k, v, scale), rest], dim=2)
    # Exactly W keys ahead of the first query, and a whole number of chunks. No query looks at the
    # zeros behind the end; `lowest` keeps it from those ahead of the first key.
    ahead = window - (keys - length)
    chunks = -(-length // window)
    behind = chunks * window - length
    key, value = (
        F.pad(tensor, (0, 0, ahead, behind)).unflatten(2, (chunks + 1, window))
        for tensor in (key, value)
    )
    query = F.pad(query, (0, 0, 0, behind)).unflatten(2, (chunks, window))
    lowest = None
    if starts is not None:
        lowest = F.pad(starts + ahead, (0, behind))
    elif ahead > 1:
        lowest = key.new_full((query.shape[0], chunks * window), ahead, dtype=torch.int64)
    context = F.scaled_dot_product_attention(
        _fold_chunks(query),
        _fold_chunks(torch.cat([key[:, :, :-1], key[:, :, 1:]], dim=3)),
        _fold_chunks(torch.cat([value[:, :, :-1], value[:, :, 1:]], dim=3)),
        attn_mask=_two_chunk_mask(window, lowest, query.device),
        scale=scale,
        enable_gqa=True,
    )  # [b * c, n, W, d]
    return context.unflatten(0, (-1, chunks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _fold_chunks(tensor: Tensor) -> Tensor:
    """`[b, heads, c, rows, d]` -> `[b * c, heads, rows, d]`."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _two_chunk_mask(window: int, lowest: Tensor | None, device: torch.device) -> Tensor:
    """True where row r of a chunk sees column j of (previous chunk, own chunk).

    Args:
        lowest: `[b, c * W]` first key of each query, counted from W keys ahead of the first query;
            None if the window alone decides.
    Returns: `[W, 2W]`, or `[b * c, 1, W, 2W]`.
    """
    row = torch.arange(window, device=device).unsqueeze(1)
    column = torch.arange(2 * window, device=device)
    mask = (column > row) & (column <= row + window)
    if lowest is None:
        return mask
    in_chunk = lowest.unflatten(1, (-1, window))
    in_chunk = in_chunk - torch.arange(in_chunk.shape[1], device=device).unsqueeze(1) * window
    return (mask & (column >= in_chunk.unsqueeze(-1))).flatten(0, 1).unsqueeze(1)
