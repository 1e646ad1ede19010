"""How many parameters a Trinity model has, and what their training state takes on a rank."""

from __future__ import annotations

import math

from megatron_trinity.planning.sizes import LayerKind, ModelSizes

WEIGHT_BYTES = 2
"""bf16."""
GRADIENT_BYTES = 4
"""fp32, accumulated over micro-batches and reduced."""
MUON_BYTES = 8
"""fp32 weight and momentum, each on one rank of those that hold the parameter."""
ADAMW_BYTES = 12
"""fp32 weight and two moments, likewise."""


def layer_parameters(sizes: ModelSizes, kind: LayerKind, experts: int) -> int:
    """Of one decoder layer, with `experts` routed experts if it is an MoE layer."""
    d = sizes.hidden_size
    heads = 3 * sizes.num_attention_heads + 2 * sizes.num_query_groups
    attention = d * sizes.head_dim * heads + 2 * sizes.head_dim  # with the norms of q and k
    norms = 4 * d
    if not kind.is_moe:
        return attention + norms + 3 * d * sizes.ffn_hidden_size
    experts += sizes.num_shared_experts
    return attention + norms + d * sizes.num_experts + 3 * d * sizes.moe_ffn_hidden_size * experts


def total_parameters(sizes: ModelSizes, vocab_size: int | None = None) -> int:
    """Of the whole model; `vocab_size` counts the rows that pad the vocabulary as well."""
    vocab_size = sizes.vocab_size if vocab_size is None else vocab_size
    kinds = sizes.layer_kinds()
    layers = sum(layer_parameters(sizes, kind, sizes.num_experts) for kind in kinds)
    return layers + sizes.hidden_size * (2 * vocab_size + 1)


def training_state_bytes(
    dense: int,
    expert: int,
    dense_ranks: int,
    expert_ranks: int,
    adamw: int,
    gradient_bytes: int = GRADIENT_BYTES,
) -> int:
    """Weights, gradients and sharded optimizer state of one rank, without activations.

    Gradients stay whole on a rank until the next step, of which it has the sums of its own share.

    Args:
        dense, expert: parameters that the rank holds outside and inside of routed experts.
        dense_ranks, expert_ranks: how many ranks share the optimizer state of each kind.
        adamw: those of `dense` that AdamW updates.
        gradient_bytes: 2 where gradients are summed in bf16.
    """
    held = (WEIGHT_BYTES + gradient_bytes) * (dense + expert)
    share = math.ceil(dense / dense_ranks) + math.ceil(expert / expert_ranks)
    moments = ADAMW_BYTES - MUON_BYTES
    return held + MUON_BYTES * share + moments * math.ceil(adamw / dense_ranks)


def active_parameters(sizes: ModelSizes) -> int:
    """Those that one token meets: the experts that it takes, embedding and LM head."""
    left_out = sizes.num_experts - sizes.topk
    moe_layers = sum(kind.is_moe for kind in sizes.layer_kinds())
    expert = 3 * sizes.hidden_size * sizes.moe_ffn_hidden_size
    return total_parameters(sizes) - moe_layers * left_out * expert
