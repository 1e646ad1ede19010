"""The core attention on Transformer Engine's, which picks cuDNN's, FlashAttention's or its own.

Shapes: s tokens of a sequence on this rank, b batch, n query heads, g key/value heads, d head_dim,
t tokens of all documents, one behind another.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_trinity.model.core_attention import TrinityCoreAttention
from megatron_trinity.model.documents import Documents


class TransformerEngineCoreAttention(TrinityCoreAttention):
    """Its kernels see whole documents or runs of queries over the keys that end with them.

    Its own context parallelism cuts each document, and has no all-gather of windows alone; so the
    exchange stays the project's, and the kernels are made as if there were none.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kinds: Any,
    ) -> None:
        super().__init__(
            config,
            layer_number,
            attn_mask_type,
            attention_type,
            attention_dropout,
            pg_collection=pg_collection,
            **kinds,
        )
        in_chunks = self.cp_group is not None and self.cp_comm_type != "a2a"
        self.kernel = _Kernel(
            config=_on_one_rank(config, 1 if in_chunks else config.context_parallel_size),
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            # A chunk of queries has more keys. Of "self", the plain torch of Transformer Engine
            # takes the lengths of the queries for those of the keys.
            attention_type="cross" if in_chunks else attention_type,
            attention_dropout=attention_dropout,
            softmax_scale=self.softmax_scale,
            pg_collection=pg_collection,
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None, position: int
    ) -> Tensor:
        """As the base class says."""
        # Top-left and bottom-right are the same where queries and keys are as many, and every
        # kernel has the first.
        mask = "causal" if query.shape[0] == key.shape[0] else "causal_bottom_right"
        if documents is None:
            context = self.kernel.attend(query, key, value, qkv_format="sbhd", attn_mask_type=mask)
            return context.reshape(query.shape)
        segments = documents.segments(position, query.shape[0], key.shape[0])
        skip = segments.unseen
        packed = self.kernel.attend(
            _pack(query, (0,) * len(skip)),
            _pack(key, skip),
            _pack(value, skip),
            qkv_format="thd",
            attn_mask_type=f"padding_{mask}",
            cu_seqlens_q=segments.cu_queries,
            cu_seqlens_kv=segments.cu_keys,
            max_seqlen_q=segments.longest_queries,
            max_seqlen_kv=segments.longest_keys,
        )
        rows, batch, heads, dim = query.shape
        return packed.reshape(batch, rows, heads, dim).transpose(0, 1)


class _Kernel(TEDotProductAttention):
    """Megatron's wrapper, called as what it wraps: it has no name for the masks of chunks."""

    # Megatron saves no state of it, so that a load must not look for any.
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        """`[s, b, n, d]` to `[s, b, n * d]`, or with documents `[t, n, d]` to `[t, n * d]`."""
        context: Tensor = super(TEDotProductAttention, self).forward(
            query, key, value, attention_mask=None, **how
        )
        return context


def _on_one_rank(config: TransformerConfig, parts: int) -> TransformerConfig:
    """The attention that is left when sequences have been exchanged for heads in so many parts."""
    config = copy.copy(config)
    config.context_parallel_size = 1
    config.num_attention_heads //= parts
    config.num_query_groups //= parts
    return config


def _pack(tensor: Tensor, skip: tuple[int, ...]) -> Tensor:
    """`[s, b, h, d]` to `[t, h, d]`, without the first so many tokens of each sequence."""
    if not any(skip):
        return tensor.transpose(0, 1).flatten(0, 1)
    return torch.cat([tensor[first:, row] for row, first in enumerate(skip)])
