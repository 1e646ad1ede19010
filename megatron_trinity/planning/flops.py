"""Model FLOPs of Trinity: the matrix products that the model needs, whatever the machine does.

A multiply-add is 2 FLOPs. Counted: projections of queries, gate, keys, values and output; logits
and weighted values of the (query, key) pairs that attend to each other; dense MLPs, router, the
routed experts that a token takes, shared experts; the LM head over the true vocabulary. Not
counted: norms, softmax, RoPE and other elementwise work, and whatever is computed twice to save
memory. Results are exact integers.

They are asked for by tokens and pairs and not by batch, so that packed documents count as they
are: `attended_pairs` turns the lengths of documents into pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from megatron_trinity.planning.sizes import LayerKind, ModelSizes

BACKWARD = 2
"""Backward has two products for each one of forward: gradients of inputs and of weights."""

PARTS = PROJECTIONS, GATE, GLOBAL, LOCAL, DENSE, ROUTER, ROUTED, SHARED, HEAD = (
    "projections of queries, keys, values and output",
    "output gate",
    "attention of global layers",
    "attention in windows",
    "dense lead-in",
    "router",
    "routed experts that a token takes",
    "shared experts",
    "LM head",
)


def attended_pairs(lengths: Sequence[int] | Any, window: int | None = None) -> int:
    """(query, key) pairs that attend to each other in documents of the given lengths.

    Token t of a document sees keys 0 ... t, or the last `window` of them: L(L + 1)/2 pairs for a
    document of L tokens that fits the window, W(W + 1)/2 + (L - W)W for a longer one.

    Args:
        lengths: of the documents; integers in a sequence, an array or a tensor on any device.
        window: keys that a query sees, itself included; None for all of them.
    """
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    inside = lengths if window is None else lengths.clamp(max=window)
    pairs = inside * (inside + 1) // 2 + (lengths - inside) * inside
    return int(pairs.sum())


def pairs_of_layers(sizes: ModelSizes, lengths: Sequence[int] | Any) -> tuple[int, int]:
    """`attended_pairs` in a global and in a local layer."""
    return attended_pairs(lengths), attended_pairs(lengths, sizes.window)


def core_attention_flops(sizes: ModelSizes, pairs: int) -> int:
    """Logits and weighted values, for every query head."""
    return 2 * 2 * pairs * sizes.num_attention_heads * sizes.head_dim


def lm_head_flops(sizes: ModelSizes, tokens: int) -> int:
    """Logits over the true vocabulary."""
    return 2 * tokens * sizes.hidden_size * sizes.vocab_size


def layer_parts(
    sizes: ModelSizes, kind: LayerKind, tokens: int, global_pairs: int, local_pairs: int
) -> dict[str, int]:
    """The forward pass of one decoder layer, by part.

    Args:
        tokens: how many go through.
        global_pairs, local_pairs: their `attended_pairs` without a window and with the model's.
    """
    heads, head_dim = sizes.num_attention_heads, sizes.head_dim
    of_head = 2 * tokens * sizes.hidden_size * head_dim
    # Of queries and output one for each head, of keys and values one for each group.
    parts = {PROJECTIONS: 2 * (heads + sizes.num_query_groups) * of_head, GATE: heads * of_head}
    if kind.is_global:
        parts[GLOBAL] = core_attention_flops(sizes, global_pairs)
    else:
        parts[LOCAL] = core_attention_flops(sizes, local_pairs)
    # Gate, up and down, for each unit of width.
    of_width = 2 * tokens * 3 * sizes.hidden_size
    if kind.is_moe:
        expert = of_width * sizes.moe_ffn_hidden_size
        parts[ROUTER] = 2 * tokens * sizes.hidden_size * sizes.num_experts
        parts[ROUTED] = sizes.topk * expert
        parts[SHARED] = sizes.num_shared_experts * expert
    else:
        parts[DENSE] = of_width * sizes.ffn_hidden_size
    return parts


def layer_flops(
    sizes: ModelSizes, kind: LayerKind, tokens: int, global_pairs: int, local_pairs: int
) -> int:
    """The forward pass of one decoder layer. Arguments as in `layer_parts`."""
    return sum(layer_parts(sizes, kind, tokens, global_pairs, local_pairs).values())


def forward_parts(
    sizes: ModelSizes,
    layers: Iterable[LayerKind],
    has_lm_head: bool,
    tokens: int,
    global_pairs: int,
    local_pairs: int,
) -> dict[str, int]:
    """The forward pass of a pipeline stage, by all `PARTS`. Arguments as in `layer_parts`."""
    parts = dict.fromkeys(PARTS, 0)
    for kind in layers:
        for part, flops in layer_parts(sizes, kind, tokens, global_pairs, local_pairs).items():
            parts[part] += flops
    if has_lm_head:
        parts[HEAD] = lm_head_flops(sizes, tokens)
    return parts


def stage_flops(
    sizes: ModelSizes,
    layers: Iterable[LayerKind],
    has_lm_head: bool,
    tokens: int,
    global_pairs: int,
    local_pairs: int,
) -> int:
    """The sum of `forward_parts`."""
    batch = tokens, global_pairs, local_pairs
    return sum(forward_parts(sizes, layers, has_lm_head, *batch).values())


def forward_flops(sizes: ModelSizes, tokens: int, global_pairs: int, local_pairs: int) -> int:
    """The forward pass of the whole model. Arguments as in `layer_parts`."""
    return stage_flops(sizes, sizes.layer_kinds(), True, tokens, global_pairs, local_pairs)


def training_flops(sizes: ModelSizes, tokens: int, global_pairs: int, local_pairs: int) -> int:
    """Forward and backward pass of the whole model. Arguments as in `layer_parts`."""
    return (1 + BACKWARD) * forward_flops(sizes, tokens, global_pairs, local_pairs)
