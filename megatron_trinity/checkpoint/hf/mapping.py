"""Which rows of Hugging Face's tensors are which rows of Trinity's: one declarative table.

On the left of a rule is a canonical name, as a `torch_dist` checkpoint has it; on the right are the
names and shapes of transformers' `AfmoeForCausalLM`, of which it is made. Everything that the two
forms differ in is an order of rows, so a model's table is a list of `Piece`s, each of them a run of
rows that stands in both; rows are counted over all axes but the last. It is read both ways.

Letters of shapes: V vocabulary, h hidden size, Q rows of all query heads, K of all key (or value)
heads, d head size, f width of the dense MLP, m of an expert, s of the shared experts, E experts,
g query groups.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from megatron_trinity.checkpoint.conversion.rows import Piece, Shape, row_count
from megatron_trinity.errors import TrinityError

if TYPE_CHECKING:  # slow to import, and a process that writes files needs none of it
    from transformers import AfmoeConfig

Experts = Literal["per-expert", "fused"]
"""The two forms of experts: three matrices each, or stacks, as transformers holds them."""

NAMED = 5
"""Tensors that an error names before it counts the others."""


@dataclass(frozen=True)
class Rule:
    """One line of the table; `{layer}` and `{expert}` stand for every layer and every expert.

    Attributes:
        trinity: canonical name.
        hf: Hugging Face name to the letters of its shape, in the order in which their rows follow.
        groups: letter of the number of groups: each tensor's rows are cut into as many equal parts,
            and the parts follow each other group by group.
        applies: whether a layer (0-based) of a configuration has the tensor.
        experts: the form that the rule is for, if not for both.
    """

    trinity: str
    hf: Mapping[str, str]
    groups: str = "1"
    applies: Callable[[AfmoeConfig, int], bool] = lambda config, layer: True
    experts: Experts | None = None


def _is_dense(config: AfmoeConfig, layer: int) -> bool:
    return layer < config.num_dense_layers


def _is_moe(config: AfmoeConfig, layer: int) -> bool:
    return not _is_dense(config, layer)


def _has_shared_experts(config: AfmoeConfig, layer: int) -> bool:
    return _is_moe(config, layer) and config.num_shared_experts > 0


EMBEDDING, LM_HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
MODEL_RULES = (
    Rule(EMBEDDING, {"model.embed_tokens.weight": "V h"}),
    Rule("decoder.final_layernorm.weight", {"model.norm.weight": "h"}),
    Rule(LM_HEAD, {"lm_head.weight": "V h"}),
)

_T = "decoder.layers.{layer}."
_H = "model.layers.{layer}."
_A = _H + "self_attn."
_S = _H + "mlp.shared_experts."
_E = _H + "mlp.experts."
FC1, FC2 = "mlp.experts.experts.linear_fc1.weight", "mlp.experts.experts.linear_fc2.weight"
LAYER_RULES = (
    Rule(_T + "input_layernorm.weight", {_H + "input_layernorm.weight": "h"}),
    Rule(
        _T + "self_attention.linear_qkv.weight",
        {
            _A + "q_proj.weight": "Q h",
            _A + "gate_proj.weight": "Q h",
            _A + "k_proj.weight": "K h",
            _A + "v_proj.weight": "K h",
        },
        groups="g",
    ),
    Rule(_T + "self_attention.q_layernorm.weight", {_A + "q_norm.weight": "d"}),
    Rule(_T + "self_attention.k_layernorm.weight", {_A + "k_norm.weight": "d"}),
    Rule(_T + "self_attention.linear_proj.weight", {_A + "o_proj.weight": "h Q"}),
    Rule(_T + "self_attn_bda.norm.weight", {_H + "post_attention_layernorm.weight": "h"}),
    Rule(_T + "pre_mlp_layernorm.weight", {_H + "pre_mlp_layernorm.weight": "h"}),
    Rule(_T + "mlp_bda.norm.weight", {_H + "post_mlp_layernorm.weight": "h"}),
    Rule(
        _T + "mlp.linear_fc1.weight",
        {_H + "mlp.gate_proj.weight": "f h", _H + "mlp.up_proj.weight": "f h"},
        applies=_is_dense,
    ),
    Rule(
        _T + "mlp.linear_fc2.weight",
        {_H + "mlp.down_proj.weight": "h f"},
        applies=_is_dense,
    ),
    Rule(_T + "mlp.router.weight", {_H + "mlp.router.gate.weight": "E h"}, applies=_is_moe),
    Rule(_T + "mlp.router.expert_bias", {_H + "mlp.expert_bias": "E"}, applies=_is_moe),
    Rule(
        _T + "mlp.shared_experts.linear_fc1.weight",
        {_S + "gate_proj.weight": "s h", _S + "up_proj.weight": "s h"},
        applies=_has_shared_experts,
    ),
    Rule(
        _T + "mlp.shared_experts.linear_fc2.weight",
        {_S + "down_proj.weight": "h s"},
        applies=_has_shared_experts,
    ),
    Rule(
        _T + FC1,
        {_E + "{expert}.gate_proj.weight": "m h", _E + "{expert}.up_proj.weight": "m h"},
        applies=_is_moe,
        experts="per-expert",
    ),
    Rule(
        _T + FC2,
        {_E + "{expert}.down_proj.weight": "h m"},
        applies=_is_moe,
        experts="per-expert",
    ),
    Rule(_T + FC1, {_E + "gate_up_proj": "E 2m h"}, applies=_is_moe, experts="fused"),
    Rule(_T + FC2, {_E + "down_proj": "E h m"}, applies=_is_moe, experts="fused"),
)


@dataclass(frozen=True)
class Entry:
    """A Trinity tensor, the Hugging Face tensors it is made of, and how.

    Attributes:
        trinity: canonical name.
        shape: its shape, with the true vocabulary.
        hf: name to shape of each Hugging Face tensor.
        pieces: in the order of the Trinity tensor's rows.
    """

    trinity: str
    shape: Shape
    hf: Mapping[str, Shape]
    pieces: tuple[Piece, ...] = field(repr=False)

    @property
    def has_vocabulary(self) -> bool:
        """Whether there is a row for each token; Megatron pads those to divide over ranks."""
        return self.trinity in (EMBEDDING, LM_HEAD)

    def padded(self, vocabulary: int) -> Shape:
        """The shape with a vocabulary padded to so many rows."""
        return (vocabulary, *self.shape[1:]) if self.has_vocabulary else self.shape


def entries(config: AfmoeConfig, experts: Experts = "per-expert") -> Iterator[Entry]:
    """The table for one model: an entry for each of its Trinity tensors."""
    sizes = _sizes(config)
    for rule in MODEL_RULES:
        yield _entry(rule, sizes, 0)
    for layer in range(config.num_hidden_layers):
        for rule in LAYER_RULES:
            if rule.applies(config, layer) and rule.experts in (None, experts):
                yield _entry(rule, sizes, layer)


def _sizes(config: AfmoeConfig) -> dict[str, int]:
    expert = config.moe_intermediate_size
    return {
        "1": 1,
        "V": config.vocab_size,
        "h": config.hidden_size,
        "Q": config.num_attention_heads * config.head_dim,
        "K": config.num_key_value_heads * config.head_dim,
        "g": config.num_key_value_heads,
        "d": config.head_dim,
        "f": config.intermediate_size,
        "m": expert,
        "2m": 2 * expert,
        "s": expert * config.num_shared_experts,
        "E": config.num_experts,
    }


def _entry(rule: Rule, sizes: Mapping[str, int], layer: int) -> Entry:
    shapes = {name: tuple(sizes[a] for a in letters.split()) for name, letters in rule.hf.items()}
    stacked = any("{expert}" in name for name in rule.hf)
    groups = sizes[rule.groups]
    hf: dict[str, Shape] = {}
    pieces: list[Piece] = []
    row = 0
    for expert in range(sizes["E"] if stacked else 1):
        block = {n.format(layer=layer, expert=expert): shape for n, shape in shapes.items()}
        hf |= block
        for group in range(groups):
            for name, shape in block.items():
                rows = row_count(shape) // groups
                pieces.append(Piece(name, group * rows, row, rows))
                row += rows
    one = next(iter(shapes.values()))
    if stacked:
        shape = (sizes["E"], row // sizes["E"], one[-1])
    else:
        shape = one if len(shapes) == 1 else (row, one[-1])
    return Entry(rule.trinity.format(layer=layer), shape, hf, tuple(pieces))


def prove_bijection(table: Iterable[Entry]) -> None:
    """Prove that every row of either side stands in the table exactly once, with its own width.

    Raises:
        TrinityError: it does not, so that a conversion would lose or repeat values.
    """
    shapes: dict[str, Shape] = {}
    runs: dict[str, list[tuple[int, int]]] = {}
    for entry in table:
        if entry.trinity in shapes or shapes.keys() & entry.hf.keys():
            raise TrinityError(f"the mapping has {entry.trinity} or a source of it twice")
        shapes |= {entry.trinity: entry.shape, **entry.hf}
        for piece in entry.pieces:
            if entry.hf[piece.hf][-1] != entry.shape[-1]:
                raise TrinityError(f"rows of {piece.hf} do not fit into {entry.trinity}")
            runs.setdefault(piece.hf, []).append((piece.hf_row, piece.rows))
            runs.setdefault(entry.trinity, []).append((piece.row, piece.rows))
    for name, shape in shapes.items():
        end = 0
        for row, rows in sorted(runs.get(name, [])):
            if row != end:
                raise TrinityError(f"the mapping has row {min(row, end)} of {name} not once")
            end += rows
        if end != row_count(shape):
            raise TrinityError(f"the mapping has {end} rows of {name}, of {row_count(shape)}")


def expert_format(names: Collection[str]) -> Experts:
    """The form of experts that a set of Hugging Face tensors is in."""
    return (
        "fused" if any(name.endswith(".experts.gate_up_proj") for name in names) else "per-expert"
    )


def check_names(found: Collection[str], table: Iterable[Entry]) -> None:
    """Check that there is every Hugging Face tensor of the table and no other.

    Raises:
        TrinityError: a tensor is missing, or one is left over.
    """
    left = set(found)
    for entry in table:
        for name in entry.hf:
            if name not in left:
                raise TrinityError(f"{name} is missing, which {entry.trinity} is made of")
            left.discard(name)
    refuse_left_over(left)


def refuse_left_over(names: Collection[str]) -> None:
    """Refuse tensors that the table does not have.

    Raises:
        TrinityError: there are any.
    """
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise TrinityError(f"no rule takes {', '.join(sorted(names)[:NAMED])}{more}")


def check_shape(name: str, found: Shape, expected: Shape) -> None:
    """Check a shape.

    Raises:
        TrinityError: it is another one.
    """
    if tuple(found) != tuple(expected):
        raise TrinityError(f"{name} has the shape {list(found)}, and not {list(expected)}")


def to_hf(
    trinity: Mapping[str, Tensor], config: AfmoeConfig, experts: Experts = "per-expert"
) -> dict[str, Tensor]:
    """Convert a whole set of canonical tensors; rows beyond the true vocabulary are dropped.

    Raises:
        TrinityError: a tensor is missing, left over, or of another shape.
    """
    source = dict(trinity)
    converted: dict[str, Tensor] = {}
    for entry in entries(config, experts):
        if entry.trinity not in source:
            raise TrinityError(
                f"{entry.trinity} is missing, which {next(iter(entry.hf))} comes from"
            )
        whole = source.pop(entry.trinity)
        check_shape(
            entry.trinity, tuple(whole.shape), entry.padded(max(len(whole), config.vocab_size))
        )
        for name, shape in entry.hf.items():
            converted[name] = torch.empty(shape, dtype=whole.dtype)
        for piece in entry.pieces:
            _rows(converted[piece.hf], piece.hf_row, piece.rows).copy_(
                _rows(whole, piece.row, piece.rows)
            )
    refuse_left_over(source)
    return converted


def _rows(tensor: Tensor, row: int, rows: int) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1])[row : row + rows]
