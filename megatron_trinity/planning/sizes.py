"""The sizes of a Trinity model that its cost depends on."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from megatron_trinity.model.architecture import layer_is_global


@dataclass(frozen=True)
class LayerKind:
    """What tells one decoder layer's cost from another's."""

    is_global: bool
    is_moe: bool


@dataclass(frozen=True)
class ModelSizes:
    """The shape of a model; names as in Megatron's and Trinity's flags.

    Attributes:
        window: keys that a query of a local layer sees, itself included.
        head_dim: of queries, keys and values (Megatron's `kv_channels`).
        vocab_size: the true vocabulary, without the rows that pad it.
    """

    num_layers: int
    num_dense_layers: int
    global_attn_every_n_layers: int
    window: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    num_experts: int
    topk: int
    moe_ffn_hidden_size: int
    num_shared_experts: int
    vocab_size: int

    @classmethod
    def from_args(cls, args: Namespace) -> ModelSizes:
        """The sizes that parsed arguments describe; `args.vocab_size` has to be known by then."""
        return cls(
            num_layers=args.num_layers,
            num_dense_layers=args.num_dense_layers,
            global_attn_every_n_layers=args.global_attn_every_n_layers,
            window=args.sliding_window,
            hidden_size=args.hidden_size,
            num_attention_heads=args.num_attention_heads,
            num_query_groups=args.num_query_groups,
            head_dim=args.kv_channels,
            ffn_hidden_size=args.ffn_hidden_size,
            num_experts=args.num_experts,
            topk=args.moe_router_topk,
            moe_ffn_hidden_size=args.moe_ffn_hidden_size,
            num_shared_experts=args.num_shared_experts,
            vocab_size=args.vocab_size,
        )

    def layer_kind(self, layer: int) -> LayerKind:
        """The kind of 0-based `layer`."""
        return LayerKind(
            is_global=layer_is_global(layer, self.global_attn_every_n_layers),
            is_moe=layer >= self.num_dense_layers,
        )

    def layer_kinds(self) -> list[LayerKind]:
        """The kinds of all layers, in order."""
        return [self.layer_kind(layer) for layer in range(self.num_layers)]
