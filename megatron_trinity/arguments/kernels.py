"""What computes on a GPU, and which flags of it cannot be."""

from __future__ import annotations

import argparse
from argparse import Namespace

from megatron_trinity.arguments.refusal import Refusal, dest_of, word_of


def add_kernel_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what Megatron cannot turn off."""
    parser.add_argument_group(title="trinity").add_argument(
        "--no-moe-permute-fusion",
        dest="moe_permute_fusion",
        action="store_false",
        help="permute tokens with torch where Transformer Engine could",
    )


def derive_kernels(args: Namespace) -> None:
    """Let the routed experts be of Transformer Engine where the other layers are."""
    if args.transformer_impl == "transformer_engine":
        args.moe_grouped_gemm = True


OF_TRANSFORMER_ENGINE = (
    "--tp-comm-overlap --moe-grouped-gemm --use-te-activation-func --fused-residual-rmsnorm "
    "--use-transformer-engine-op-fuser --moe-single-grouped-weight "
    "--moe-single-grouped-bias --use-grouped-gemm-for-dense-mlp "
    "--use-grouped-gemm-for-shared-expert --fine-grained-activation-offloading "
    "--use-kitchen-attention --flash-attention-version --use-flash-attn"
)
"""Flags that its layers alone take."""


def _asks_for_other_layers(args: Namespace) -> bool:
    return word_of(args.attention_backend) in ("flash", "fused") or any(
        getattr(args, dest_of(flag)) for flag in OF_TRANSFORMER_ENGINE.split()
    )


KERNEL_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "layers-of-others",
        lambda a: a.transformer_impl == "local" and _asks_for_other_layers(a),
        f"{', '.join(f'{{{flag}}}' for flag in OF_TRANSFORMER_ENGINE.split())} and "
        "{--attention-backend} flash and fused are of Transformer Engine's layers, and would "
        "change nothing with {--transformer-impl=}; leave them out",
    ),
    Refusal(
        "deterministic-exchange",
        lambda a: a.deterministic_mode and a.moe_token_dispatcher_type == "flex",
        "{--moe-token-dispatcher-type} flex hands tokens over in the order in which they arrive, "
        "and {--deterministic-mode} is bit by bit; use alltoall",
    ),
)
