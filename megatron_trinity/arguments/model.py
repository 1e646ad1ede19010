"""The model: its flags, the Megatron arguments that follow from them, and its sizes."""

from __future__ import annotations

import argparse
from argparse import Namespace

from megatron_trinity.arguments.refusal import Refusal, dest_of, refuse, word_of
from megatron_trinity.model.architecture import initializer_sigma, moe_pattern, no_rope_pattern


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to `parser`."""
    group = parser.add_argument_group(title="trinity model")
    group.add_argument(
        "--sliding-window",
        type=int,
        metavar="W",
        help="keys that a query of a local layer sees, itself included",
    )
    group.add_argument(
        "--global-attn-every-n-layers",
        type=int,
        default=4,
        metavar="N",
        help="every N-th layer is global: full attention, no RoPE (default: %(default)s)",
    )
    group.add_argument(
        "--num-dense-layers",
        type=int,
        default=0,
        metavar="K",
        help="layers at the start with a dense MLP in place of experts (default: %(default)s)",
    )
    group.add_argument(
        "--num-shared-experts",
        type=int,
        default=1,
        metavar="S",
        help="experts that see every token (default: %(default)s)",
    )
    group.add_argument(
        "--mup-enabled",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="multiply token embeddings by sqrt(hidden size) (default: %(default)s)",
    )


def derive_model(args: Namespace) -> None:
    """Set, in place, the Megatron arguments that follow from Trinity's.

    Raises:
        UsageError: one of them was given: none is overridden in silence.
    """
    refuse(args, REPLACED_REFUSALS)
    every = args.global_attn_every_n_layers
    if args.num_layers is not None and every > 0:
        args.no_rope_freq = no_rope_pattern(args.num_layers, every)
        args.moe_layer_freq = moe_pattern(args.num_layers, args.num_dense_layers)
        args.window_attn_skip_freq = every
    if args.sliding_window is not None:
        args.window_size = (args.sliding_window - 1, 0)  # Megatron counts the keys to the left.
    if args.num_shared_experts and args.moe_ffn_hidden_size:
        args.moe_shared_expert_intermediate_size = (
            args.num_shared_experts * args.moe_ffn_hidden_size
        )
    if args.init_method_std is None and args.hidden_size is not None:
        args.init_method_std = initializer_sigma(args.hidden_size)
    args.weight_init_seed = args.seed


REPLACED = {
    "window_size": "--sliding-window",
    "window_attn_skip_freq": "--global-attn-every-n-layers",
    "no_rope_freq": "--global-attn-every-n-layers",
    "moe_layer_freq": "--num-dense-layers",
    "moe_shared_expert_intermediate_size": "--num-shared-experts",
}
"""Megatron's arguments whose place a Trinity flag takes, and that flag."""


def _replaced(dest: str, instead: str) -> Refusal:
    flag = "--" + dest.replace("_", "-")
    return Refusal(
        flag.removeprefix("--"),
        lambda a: getattr(a, dest) is not None,
        f"{{{flag}}} follows from a Trinity flag; use {{{instead}}}",
    )


REPLACED_REFUSALS = tuple(_replaced(dest, instead) for dest, instead in REPLACED.items())

SIZES = (
    "--num-layers --hidden-size --num-attention-heads --num-experts --moe-ffn-hidden-size "
    "--sliding-window --seq-length --max-position-embeddings --micro-batch-size"
)
"""Flags without which there is no model, or no step of it; what else it has follows from them."""


def _lacks_sizes(args: Namespace) -> bool:
    return any(getattr(args, dest_of(flag)) is None for flag in SIZES.split())


MODEL_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "no-model",
        _lacks_sizes,
        f"no whole model is given; use {{--preset}}, or give also {{missing: {SIZES}}}",
    ),
    Refusal(
        "head-size",
        lambda a: a.kv_channels is None and a.hidden_size % (2 * a.num_attention_heads) != 0,
        "{--hidden-size=} does not divide into {--num-attention-heads=} of an even size; give the "
        "size of a head, {--kv-channels}",
    ),
    Refusal(
        "head-size-odd",
        lambda a: a.kv_channels is not None and a.kv_channels % 2 != 0,
        "{--kv-channels=}: RoPE turns pairs of channels; use an even number",
    ),
    Refusal(
        "attention-backend",
        lambda a: word_of(a.attention_backend) == "local",
        "{--attention-backend} local needs layers of Megatron's own; use auto or unfused",
    ),
    Refusal(
        "window-too-small",
        lambda a: a.sliding_window < 1,
        "{--sliding-window=}: a token sees at least itself; use 1 or more",
    ),
    Refusal(
        "global-every",
        lambda a: a.global_attn_every_n_layers < 1,
        "{--global-attn-every-n-layers=}: use 1 (all global) or more",
    ),
    Refusal(
        "dense-layers",
        lambda a: not 0 <= a.num_dense_layers < a.num_layers,
        "{--num-dense-layers=} of {--num-layers=}: a Trinity model has at least one MoE layer",
    ),
    Refusal(
        "shared-experts",
        lambda a: a.num_shared_experts < 0,
        "{--num-shared-experts=}: use 0 or more",
    ),
    Refusal(
        "topk",
        lambda a: not 1 <= a.moe_router_topk <= a.num_experts,
        "{--moe-router-topk=} of {--num-experts=}: use 1 to as many",
    ),
)
