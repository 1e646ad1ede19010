"""Small Trinity models for tests, built from command-line flags as the trainer builds them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AfmoeConfig

# Always there: what the trainer needs and a test of the model does not care about.
BATCH_FLAGS = (
    "--micro-batch-size",
    "1",
    "--seq-length",
    "64",
    "--train-iters",
    "1",
    "--lr",
    "1e-3",
)


def afmoe_config(**overrides: Any) -> AfmoeConfig:
    """A configuration that runs in milliseconds and has everything a Trinity model has."""
    sizes: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_dense_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "route_scale": 1.5,
        "global_attn_every_n_layers": 4,
        "sliding_window": 7,
        "mup_enabled": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return AfmoeConfig(**{**sizes, **overrides})


def parse(config: AfmoeConfig, flags: Sequence[str] = ()) -> Namespace:
    """Parsed arguments of the model that `config` describes."""
    from megatron_trinity.arguments.parse import parse_arguments
    from megatron_trinity.checkpoint.hf.config import flags_from_hf_config

    args = parse_arguments([*BATCH_FLAGS, *flags_from_hf_config(config), *flags])
    args.padded_vocab_size = config.vocab_size
    return args


def build(args: Namespace) -> Any:
    """The model, or this rank's first stage of it, in the layout that `args` ask for."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_trinity.model.builder import TrinityModelBuilder
    from megatron_trinity.model.config import model_config_from_args

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return TrinityModelBuilder(model_config_from_args(args)).build_model(groups)


def load_whole_tensors(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Copy this rank's part of each canonical tensor into `model`, in place.

    Raises:
        KeyError: a tensor of the model is missing from `tensors`.
        ValueError: a shape differs.
    """
    from megatron_trinity.model.shards import model_shards

    with torch.no_grad():
        for shard in model_shards(model):
            whole = tensors[shard.key]
            if tuple(whole.shape) != shard.global_shape:
                raise ValueError(
                    f"{shard.key}: the model has {list(shard.global_shape)}, "
                    f"the source has {list(whole.shape)}"
                )
            shard.data.copy_(shard.of(whole[shard.index]))
