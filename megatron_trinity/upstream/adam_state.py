"""Adam's state by canonical name: the same in every layout, sharding and precision."""

from __future__ import annotations

import functools
from typing import Any

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="adam-state",
    symbols=(
        "megatron.core.optimizer.optimizer.ChainedOptimizer.sharded_state_dict",
        "megatron.core.optimizer.optimizer.ChainedOptimizer.load_state_dict",
        "megatron.core.optimizer.optimizer.FP32Optimizer.sharded_state_dict",
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
        ".sharded_param_state_fully_reshardable",
        "megatron.training.checkpointing._build_sharded_state_dict_metadata",
    ),
    reason=(
        "each of Megatron's optimizers around Adam saves its state in a form of its own: tensors "
        "are cut as buffers of the distributed one are, or under canonical names with a flag, "
        "without fp32 weights where the model is fp32; and all keep lists of parameter groups, as "
        "long as the layout makes them, which another layout cannot load"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="`ChainedOptimizer.sharded_state_dict` is the same for every optimizer in it",
    after=(
        "checkpoint-metadata",
        "distributed-adam-steps",
    ),
)


def install() -> None:
    """Replace the two methods of the chain, and name the format in every checkpoint.

    What a checkpoint's metadata say of it decides what Megatron loads into, whoever wrote it.
    """
    from megatron.core.optimizer.optimizer import ChainedOptimizer
    from megatron.training import checkpointing

    from megatron_trinity.upstream.parts.canonical_adam import (
        SHARDING,
        or_native,
        sharded_state_dict,
    )

    ChainedOptimizer.sharded_state_dict = sharded_state_dict
    ChainedOptimizer.load_state_dict = or_native(ChainedOptimizer.load_state_dict)
    build_metadata = checkpointing._build_sharded_state_dict_metadata

    @functools.wraps(build_metadata)
    def with_sharding(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**build_metadata(*args, **kwargs), **SHARDING}

    checkpointing._build_sharded_state_dict_metadata = with_sharding
