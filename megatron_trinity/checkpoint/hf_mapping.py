"""Which Hugging Face tensors make up which Trinity tensor: one declarative table.

On the left are canonical names, as a `torch_dist` checkpoint has them; on the right the names of
transformers' `AfmoeForCausalLM` in the form of one tensor per expert. Every rule runs both ways.

Shapes: h hidden_size, n query heads, g key/value heads, d head_dim, f width of an MLP, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AfmoeConfig

from megatron_trinity.errors import TrinityError

Join = Callable[[Sequence[Tensor], AfmoeConfig], Tensor]
Split = Callable[[Tensor, AfmoeConfig], Sequence[Tensor]]


@dataclass(frozen=True)
class Fusion:
    """How Hugging Face tensors become one Trinity tensor, and back."""

    join: Join
    split: Split


def _join_qkv(parts: Sequence[Tensor], config: AfmoeConfig) -> Tensor:
    # Megatron interleaves by query group: its query heads, its gate heads, its key, its value.
    groups = [part.unflatten(0, (config.num_key_value_heads, -1)) for part in parts]
    return torch.cat(groups, dim=1).flatten(0, 1)


def _split_qkv(whole: Tensor, config: AfmoeConfig) -> Sequence[Tensor]:
    query = config.num_attention_heads // config.num_key_value_heads * config.head_dim
    rows = [query, query, config.head_dim, config.head_dim]
    grouped = whole.unflatten(0, (config.num_key_value_heads, sum(rows)))
    return [part.flatten(0, 1) for part in grouped.split(rows, dim=1)]


def _join_expert_gate_up(parts: Sequence[Tensor], config: AfmoeConfig) -> Tensor:
    return torch.stack(list(parts)).unflatten(0, (config.num_experts, 2)).flatten(1, 2)


def _split_expert_gate_up(whole: Tensor, config: AfmoeConfig) -> Sequence[Tensor]:
    return whole.unflatten(1, (2, -1)).flatten(0, 1).unbind()


COPY = Fusion(lambda parts, _: parts[0], lambda whole, _: [whole])
QKV = Fusion(_join_qkv, _split_qkv)
"""q `[n*d, h]`, gate `[n*d, h]`, k `[g*d, h]`, v `[g*d, h]` <-> `[(2n + 2g)*d, h]`."""
GATE_UP = Fusion(lambda parts, _: torch.cat(list(parts)), lambda whole, _: whole.chunk(2))
"""gate `[f, h]`, up `[f, h]` <-> `[2f, h]`."""
EXPERTS_GATE_UP = Fusion(_join_expert_gate_up, _split_expert_gate_up)
"""gate and up `[f, h]` of every expert <-> `[E, 2f, h]`."""
EXPERTS = Fusion(lambda parts, _: torch.stack(list(parts)), lambda whole, _: whole.unbind())
"""`[h, f]` of every expert <-> `[E, h, f]`."""


@dataclass(frozen=True)
class Rule:
    """One line of the table; `{layer}` and `{expert}` stand for every layer and every expert.

    Attributes:
        trinity: canonical name.
        hf: Hugging Face names, in the order that `fusion.join` takes them.
        applies: whether a layer (0-based) of a configuration has the tensor.
    """

    trinity: str
    hf: tuple[str, ...]
    fusion: Fusion = COPY
    applies: Callable[[AfmoeConfig, int], bool] = lambda config, layer: True


def _is_dense(config: AfmoeConfig, layer: int) -> bool:
    return layer < config.num_dense_layers


def _is_moe(config: AfmoeConfig, layer: int) -> bool:
    return not _is_dense(config, layer)


def _has_shared_experts(config: AfmoeConfig, layer: int) -> bool:
    return _is_moe(config, layer) and config.num_shared_experts > 0


VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors with a row for each token; Megatron pads them to divide over ranks."""

MODEL_RULES = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Rule("output_layer.weight", ("lm_head.weight",)),
)

_T = "decoder.layers.{layer}."
_H = "model.layers.{layer}."
_A = _H + "self_attn."
_S = _H + "mlp.shared_experts."
_E = _H + "mlp.experts.{expert}."
LAYER_RULES = (
    Rule(_T + "input_layernorm.weight", (_H + "input_layernorm.weight",)),
    Rule(
        _T + "self_attention.linear_qkv.weight",
        tuple(_A + f"{name}_proj.weight" for name in ("q", "gate", "k", "v")),
        QKV,
    ),
    Rule(_T + "self_attention.q_layernorm.weight", (_A + "q_norm.weight",)),
    Rule(_T + "self_attention.k_layernorm.weight", (_A + "k_norm.weight",)),
    Rule(_T + "self_attention.linear_proj.weight", (_A + "o_proj.weight",)),
    Rule(_T + "self_attn_bda.norm.weight", (_H + "post_attention_layernorm.weight",)),
    Rule(_T + "pre_mlp_layernorm.weight", (_H + "pre_mlp_layernorm.weight",)),
    Rule(_T + "mlp_bda.norm.weight", (_H + "post_mlp_layernorm.weight",)),
    Rule(
        _T + "mlp.linear_fc1.weight",
        (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"),
        GATE_UP,
        _is_dense,
    ),
    Rule(_T + "mlp.linear_fc2.weight", (_H + "mlp.down_proj.weight",), COPY, _is_dense),
    Rule(_T + "mlp.router.weight", (_H + "mlp.router.gate.weight",), COPY, _is_moe),
    Rule(_T + "mlp.router.expert_bias", (_H + "mlp.expert_bias",), COPY, _is_moe),
    Rule(
        _T + "mlp.shared_experts.linear_fc1.weight",
        (_S + "gate_proj.weight", _S + "up_proj.weight"),
        GATE_UP,
        _has_shared_experts,
    ),
    Rule(
        _T + "mlp.shared_experts.linear_fc2.weight",
        (_S + "down_proj.weight",),
        COPY,
        _has_shared_experts,
    ),
    Rule(
        _T + "mlp.experts.experts.linear_fc1.weight",
        (_E + "gate_proj.weight", _E + "up_proj.weight"),
        EXPERTS_GATE_UP,
        _is_moe,
    ),
    Rule(
        _T + "mlp.experts.experts.linear_fc2.weight", (_E + "down_proj.weight",), EXPERTS, _is_moe
    ),
)


@dataclass(frozen=True)
class Entry:
    """A rule for one layer: a canonical name and the Hugging Face names it is made of."""

    trinity: str
    hf: tuple[str, ...]
    fusion: Fusion


def entries(config: AfmoeConfig) -> Iterator[Entry]:
    """The table for one model: an entry for each of its Trinity tensors."""
    for rule in MODEL_RULES:
        yield Entry(rule.trinity, rule.hf, rule.fusion)
    for layer in range(config.num_hidden_layers):
        for rule in LAYER_RULES:
            if rule.applies(config, layer):
                yield Entry(
                    rule.trinity.format(layer=layer),
                    tuple(_names(rule, layer, config.num_experts)),
                    rule.fusion,
                )


def _names(rule: Rule, layer: int, num_experts: int) -> Iterator[str]:
    per_expert = "{expert}" in rule.hf[0]
    for expert in range(num_experts if per_expert else 1):
        for name in rule.hf:
            yield name.format(layer=layer, expert=expert)


def to_trinity(hf: Mapping[str, Tensor], config: AfmoeConfig) -> dict[str, Tensor]:
    """Convert a whole state dict; experts may be fused, as transformers holds them in memory.

    Raises:
        TrinityError: a tensor is missing, or one is left over.
    """
    source = {name: tensor for name, tensor in _per_expert(hf) if tensor.numel()}
    converted = {}
    for entry in entries(config):
        missing = [name for name in entry.hf if name not in source]
        if missing:
            raise TrinityError(f"{missing[0]} is missing, which {entry.trinity} is made of")
        converted[entry.trinity] = entry.fusion.join(
            [source.pop(name) for name in entry.hf], config
        )
    if source:
        raise TrinityError(f"no rule takes {', '.join(sorted(source))}")
    return converted


def to_hf(trinity: Mapping[str, Tensor], config: AfmoeConfig) -> dict[str, Tensor]:
    """Convert a whole set of canonical tensors; rows beyond the true vocabulary are dropped.

    Raises:
        TrinityError: a tensor is missing, or one is left over.
    """
    source = dict(trinity)
    converted: dict[str, Tensor] = {}
    for entry in entries(config):
        if entry.trinity not in source:
            raise TrinityError(f"{entry.trinity} is missing, which {entry.hf[0]} comes from")
        converted.update(hf_tensors(entry, source.pop(entry.trinity), config))
    if source:
        raise TrinityError(f"no rule takes {', '.join(sorted(source))}")
    return converted


def hf_tensors(entry: Entry, whole: Tensor, config: AfmoeConfig) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each Hugging Face tensor that the Trinity tensor `whole` holds."""
    for name, tensor in zip(entry.hf, entry.fusion.split(whole, config), strict=True):
        yield name, tensor[: config.vocab_size] if name in VOCABULARY else tensor


def _per_expert(hf: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Take apart `experts.gate_up_proj` `[E, 2f, h]` and `experts.down_proj` `[E, h, f]`."""
    for name, tensor in hf.items():
        if name.endswith(".experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for expert, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)
                yield f"{prefix}{expert}.gate_proj.weight", gate
                yield f"{prefix}{expert}.up_proj.weight", up
        elif name.endswith(".experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            for expert, down in enumerate(tensor):
                yield f"{prefix}{expert}.down_proj.weight", down
        else:
            yield name, tensor
