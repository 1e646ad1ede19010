"""Hugging Face's `config.json` of an AfMoE model, from and to the arguments of a Trinity model."""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from typing import Any

from transformers import AfmoeConfig

OLDER_KEYS = {
    "n_group": 1,
    "num_expert_groups": 1,
    "num_limited_groups": 1,
    "route_norm": True,
    "rope_scaling": None,
    "score_func": "sigmoid",
    "topk_group": 1,
}
"""Keys that transformers no longer writes; vLLM needs them, and SGLang to route by sigmoid."""


def hf_config_from_args(args: Namespace) -> AfmoeConfig:
    """The Hugging Face configuration of the model that parsed arguments describe."""
    return AfmoeConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size,
        moe_intermediate_size=args.moe_ffn_hidden_size,
        num_hidden_layers=args.num_layers,
        num_dense_layers=args.num_dense_layers,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_query_groups,
        head_dim=args.kv_channels,
        max_position_embeddings=args.max_position_embeddings,
        initializer_range=args.init_method_std,
        rms_norm_eps=args.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(args.rotary_base)},
        num_experts=args.num_experts,
        num_experts_per_tok=args.moe_router_topk,
        num_shared_experts=args.num_shared_experts,
        route_scale=args.moe_router_topk_scaling_factor or 1.0,
        global_attn_every_n_layers=args.global_attn_every_n_layers,
        sliding_window=args.sliding_window,
        mup_enabled=args.mup_enabled,
    )


def flags_from_hf_config(config: AfmoeConfig) -> list[str]:
    """The command-line flags of the model that a Hugging Face configuration describes."""
    values = {
        "vocab-size": config.vocab_size,
        "hidden-size": config.hidden_size,
        "ffn-hidden-size": config.intermediate_size,
        "moe-ffn-hidden-size": config.moe_intermediate_size,
        "num-layers": config.num_hidden_layers,
        "num-dense-layers": config.num_dense_layers,
        "num-attention-heads": config.num_attention_heads,
        "num-query-groups": config.num_key_value_heads,
        "kv-channels": config.head_dim,
        "max-position-embeddings": config.max_position_embeddings,
        "init-method-std": config.initializer_range,
        "norm-epsilon": config.rms_norm_eps,
        "rotary-base": int(config.rope_parameters["rope_theta"]),
        "num-experts": config.num_experts,
        "moe-router-topk": config.num_experts_per_tok,
        "num-shared-experts": config.num_shared_experts,
        "moe-router-topk-scaling-factor": config.route_scale,
        "global-attn-every-n-layers": config.global_attn_every_n_layers,
        "sliding-window": config.sliding_window,
    }
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [*flags, "--mup-enabled" if config.mup_enabled else "--no-mup-enabled"]


def args_from_hf_config(config: AfmoeConfig, *flags: str) -> Namespace:
    """The arguments of a run of one process with the model that a configuration describes.

    Args:
        flags: of the command line, beside those of the model.

    Raises:
        UsageError: the model is none that this project trains.
    """
    from megatron_trinity.arguments.parse import parse_arguments

    run = {
        "--seq-length": str(config.max_position_embeddings),
        "--micro-batch-size": "1",
        "--train-iters": "1",
        "--lr": "0",
    }
    words = [word for pair in run.items() for word in pair]
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints all arguments
        return parse_arguments([*flags_from_hf_config(config), *words, *flags])


def config_json(config: AfmoeConfig, dtype: str) -> dict[str, Any]:
    """What goes into `config.json`: today's keys and the older ones, for every reader to agree.

    Args:
        dtype: dtype of the weights beside it, as torch names it.
    """
    return {
        **config.to_dict(),
        **OLDER_KEYS,
        "architectures": ["AfmoeForCausalLM"],
        "dtype": dtype,
        "rope_theta": config.rope_parameters["rope_theta"],
    }
