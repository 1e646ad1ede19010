"""The core attention: what each backend's has in common, and the portable one.

Shapes: s tokens of a sequence on this rank, b batch, n query heads, g key/value heads, d head_dim.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.attention.flex_attention import BlockMask

from megatron_trinity.model.architecture import CP_COMM_TYPES
from megatron_trinity.model.attention import causal_attention, window_attention
from megatron_trinity.model.context_parallel import (
    chunks_of,
    exchange_windows,
    gather_sequence,
    heads_to_sequence,
    sequence_to_heads,
)
from megatron_trinity.model.documents import Documents
from megatron_trinity.model.flexible_attention import (
    document_mask,
    flexible_attention,
    is_flexible,
    window_mask,
)


class TrinityCoreAttention(MegatronModule):
    """Causal attention, in a window in local layers, within documents, over split sequences.

    What a context-parallel rank needs of the others is exchanged here, and a backend attends to
    what is then on the rank.

    Takes the arguments of `megatron.core.transformer.dot_product_attention.DotProductAttention`
    and of its Transformer Engine counterpart. A mask or a bias would be ignored, so they are
    refused.
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
        if config.context_parallel_size > 1 and cp_comm_type not in CP_COMM_TYPES:
            raise ValueError(f"context parallelism by {cp_comm_type} is not one of {CP_COMM_TYPES}")
        self.cp_group = None
        if config.context_parallel_size > 1:
            if pg_collection is None:
                raise ValueError("context parallelism needs pg_collection")
            self.cp_group = pg_collection.cp
        self.cp_comm_type = cp_comm_type
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
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("Trinity's core attention takes no mask and no bias")
        documents = packed_seq_params
        if documents is not None and not isinstance(documents, Documents):
            raise ValueError("Trinity's core attention takes documents, not packed tokens")
        if self.cp_group is None:
            context = self.attend(query, key, value, documents, 0)
        elif self.cp_comm_type == "a2a":
            q, k, v = (sequence_to_heads(t, self.cp_group) for t in (query, key, value))
            context = heads_to_sequence(self.attend(q, k, v, documents, 0), self.cp_group)
        else:
            context = self._attend_in_chunks(query, key, value, documents, self.cp_group)
        return context.flatten(2)

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None, position: int
    ) -> Tensor:
        """Attention of a run of queries over the keys that end with them.

        Args:
            query: `[rows, b, n, d]`; key, value: `[p + rows, b, g, d]`, of which the last `rows`
                are those of the queries.
            position: of the first query in the sequence.
        Returns: `[rows, b, n, d]`.
        """

    def _attend_in_chunks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Documents | None,
        group: ProcessGroup,
    ) -> Tensor:
        """Each of this rank's two chunks of queries over all keys that it can see."""
        length = query.shape[0] // 2
        chunks = chunks_of(group.rank(), group.size())
        pairs = torch.cat([key, value], dim=-1)
        if self.window is None:
            whole = gather_sequence(pairs, group)
            seen = tuple(whole[: (chunk + 1) * length] for chunk in chunks)
        else:
            seen = exchange_windows(pairs, self.window, group)
        contexts = []
        for chunk, rows, keys in zip(chunks, query.chunk(2), seen, strict=True):
            k, v = keys.chunk(2, dim=-1)
            contexts.append(self.attend(rows, k, v, documents, chunk * length))
        return torch.cat(contexts)


class PortableCoreAttention(TrinityCoreAttention):
    """On torch's scaled-dot-product attention; needs neither a GPU nor Transformer Engine."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None, position: int
    ) -> Tensor:
        """As the base class says."""
        part = None
        if documents is not None:
            rows = query.shape[0]
            part = documents.part(position, rows, position + rows - key.shape[0])
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        starts = None if part is None else part.starts
        window = self.window if self.window is not None and self.window < k.shape[2] else None
        # Causal attention of whole sequences is torch's own kernel.
        plain = window is None and starts is None and q.shape[2] == k.shape[2]
        flexible = self.config.attention_backend != AttnBackend.unfused
        if flexible and not plain and is_flexible(q):
            mask = _block_mask(q, k, window, part)
            context = flexible_attention(q, k, v, self.softmax_scale, mask)
        elif window is None:
            context = causal_attention(q, k, v, self.softmax_scale, starts)
        else:
            context = window_attention(q, k, v, window, self.softmax_scale, starts)
        return context.permute(2, 0, 1, 3)


def _block_mask(
    query: Tensor, key: Tensor, window: int | None, documents: Documents | None
) -> BlockMask:
    """Made once for all layers with this window."""
    if documents is None:
        return window_mask(query.shape[0], query.shape[2], key.shape[2], window, query.device)
    if window not in documents.masks:
        documents.masks[window] = document_mask(documents.starts, key.shape[2], window)
    mask: BlockMask = documents.masks[window]
    return mask


def layer_window(config: TransformerConfig, layer_number: int) -> int | None:
    """Keys that a query of layer `layer_number` (1-based) sees, itself included; None if all."""
    if not is_layer_window_attention(
        config.window_size, config.window_attn_skip_freq, layer_number
    ):
        return None
    left, _ = config.window_size
    return left + 1
