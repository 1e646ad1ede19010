"""Core attention on torch's scaled-dot-product attention: causal, or causal within a window.

Shapes: s sequence, b batch, n query heads, g key/value heads (n a multiple of g), d head_dim,
W window, c number of chunks of W tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention with grouped queries.

    Args:
        query: `[b, n, s, d]`; key, value: `[b, g, s, d]`, of one floating dtype.
        scale: factor on the logits, 1/sqrt(d) for Trinity.
    Returns: `[b, n, s, d]`.
    """
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int, scale: float
) -> Tensor:
    """Causal attention where token t sees the `window` keys t - window + 1 ... t (report, eq. 8).

    Queries are cut into chunks of `window` tokens; a chunk needs only its own keys and those of the
    chunk before it, so memory and work grow with s x W instead of s x s.

    Args and result as in `causal_attention`.
    """
    length = query.shape[2]
    if window >= length:
        return causal_attention(query, key, value, scale)
    chunks = -(-length // window)
    # Padding is at the end, where no real query looks.
    padding = chunks * window - length
    query, key, value = (
        F.pad(tensor, (0, 0, 0, padding)).unflatten(2, (chunks, window))
        for tensor in (query, key, value)
    )  # [b, heads, c, W, d]
    first = causal_attention(query[:, :, 0], key[:, :, 0], value[:, :, 0], scale)
    rest = F.scaled_dot_product_attention(
        _fold_chunks(query[:, :, 1:]),
        _fold_chunks(torch.cat([key[:, :, :-1], key[:, :, 1:]], dim=3)),
        _fold_chunks(torch.cat([value[:, :, :-1], value[:, :, 1:]], dim=3)),
        attn_mask=_two_chunk_mask(window, query.device),
        scale=scale,
        enable_gqa=True,
    )  # [b * (c - 1), n, W, d]
    rest = rest.unflatten(0, (query.shape[0], chunks - 1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest], dim=2)[:, :, :length]


def _fold_chunks(tensor: Tensor) -> Tensor:
    """`[b, heads, c, rows, d]` -> `[b * c, heads, rows, d]`."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _two_chunk_mask(window: int, device: torch.device) -> Tensor:
    """`[W, 2W]`, true where row r of a chunk sees column j of (previous chunk, own chunk)."""
    row = torch.arange(window, device=device).unsqueeze(1)
    column = torch.arange(2 * window, device=device).unsqueeze(0)
    return (column > row) & (column <= row + window)


class PortableCoreAttention(MegatronModule):
    """The core attention of the portable layer spec; needs neither a GPU nor Transformer Engine.

    Takes the arguments of `megatron.core.transformer.dot_product_attention.DotProductAttention`.
    A mask, a bias or packed sequences would be ignored, so they are refused.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"Trinity's attention is causal; got {attn_mask_type}")
        if config.attention_dropout:
            raise ValueError("Trinity's attention has no dropout")
        if config.context_parallel_size > 1:
            raise ValueError("the portable core attention does not split sequences over ranks")
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.window = layer_window(config, layer_number)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """`[s, b, n, d]` queries and `[s, b, g, d]` keys and values to `[s, b, n * d]`."""
        if not (attention_mask is None and attention_bias is None and packed_seq_params is None):
            raise ValueError("the portable core attention takes no mask, bias or packed sequences")
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if self.window is None:
            context = causal_attention(query, key, value, self.softmax_scale)
        else:
            context = window_attention(query, key, value, self.window, self.softmax_scale)
        return context.permute(2, 0, 1, 3).flatten(2)


def layer_window(config: TransformerConfig, layer_number: int) -> int | None:
    """Keys that a query of layer `layer_number` (1-based) sees, itself included; None if all."""
    if not is_layer_window_attention(
        config.window_size, config.window_attn_skip_freq, layer_number
    ):
        return None
    left, _ = config.window_size
    return left + 1
