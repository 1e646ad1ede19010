"""The parts that a model's layers are, by kind, and its head."""

from __future__ import annotations

from collections import Counter
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_trinity.model.core_attention import layer_window
from megatron_trinity.planning.costs.operations import mark_on_host
from megatron_trinity.planning.costs.parts import EXPERTS, HEAD, KINDS
from megatron_trinity.planning.costs.places import Places

ON_HOST = ("sort_input_by_local_experts", "restore_output_by_local_experts")
"""Constants of the dispatcher of tokens, which Megatron makes on the host."""


def watch_layers(model: Any, places: Places) -> dict[str, int]:
    """Make parts of the layers of a `GPTModel`; returns how many there are of each kind.

    What follows on the layers until the part around them ends is the head's.
    """
    numbers: Counter[str] = Counter()
    for layer in model.decoder.layers:
        is_global = layer_window(layer.config, layer.layer_number) is None
        is_moe = isinstance(layer.mlp, MoELayer)
        kind = KINDS[is_moe + (is_moe and is_global)]
        places.watch(layer, kind)
        numbers[kind] += 1
        if is_moe:
            places.watch(layer.mlp.experts, kind + EXPERTS)
            mark_on_host([getattr(layer.mlp.token_dispatcher, name) for name in ON_HOST])
    places.watch(model.decoder.final_layernorm, HEAD)
    model.decoder.register_forward_hook(lambda *_: places.switch(HEAD))
    return dict(numbers)
