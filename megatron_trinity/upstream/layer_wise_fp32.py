"""The layer-wise distributed optimizer in fp32.

Reason: it wraps its torch optimizers in Megatron's only for bf16. In fp32 the raw ones have no
`config`, so chaining it with the distributed optimizer of the other parameters fails on
`assert self.config == ...`, they lack the methods that a step needs, and its checkpoints expect
the state under the key `optimizer`, where the wrapper for bf16 has it.
Written for: megatron-core 0.19.2.
Remove when: `LayerWiseDistributedOptimizer` wraps for fp32, and saves and loads what it wrapped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig


class LayerWiseFP32Optimizer(FP32Optimizer):
    """`FP32Optimizer` with its sharded state under the key that the layer-wise one expects."""

    def sharded_state_dict(
        self,
        model_sharded_state_dict: dict[str, Any],
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """`{"optimizer": ...}` of sharded tensors; see `FP32Optimizer.sharded_state_dict`."""
        state = super().sharded_state_dict(model_sharded_state_dict, is_loading, metadata)
        return {"optimizer": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `sharded_state_dict` or `state_dict` gave."""
        super().load_state_dict(state_dict.get("optimizer", state_dict))


def install() -> None:
    """Wrap the optimizers at the same place as for bf16: right after they are sharded."""
    original_init = LayerWiseDistributedOptimizer.__init__
    original_shard_params = LayerWiseDistributedOptimizer.shard_params

    @functools.wraps(original_init)
    def __init__(
        self: LayerWiseDistributedOptimizer,
        optimizers: list[Any],
        config: OptimizerConfig,
        pg_collection: Any = None,
        init_state_fn_list: list[Callable[..., None]] | None = None,
        model_chunks: list[Any] | None = None,
    ) -> None:
        def wrap() -> None:
            for index, optimizer in enumerate(optimizers):
                if config.bf16 or isinstance(optimizer, MegatronOptimizer):
                    continue
                init_state_fn = init_state_fn_list[index] if init_state_fn_list else None
                optimizers[index] = LayerWiseFP32Optimizer(optimizer, config, init_state_fn)

        self.wrap_sharded_optimizers = wrap
        original_init(self, optimizers, config, pg_collection, init_state_fn_list, model_chunks)
        del self.wrap_sharded_optimizers

    @functools.wraps(original_shard_params)
    def shard_params(
        self: LayerWiseDistributedOptimizer,
        optimizers: list[torch.optim.Optimizer],
        full_param_layouts: list[Any] | None = None,
    ) -> None:
        original_shard_params(self, optimizers, full_param_layouts)
        self.wrap_sharded_optimizers()

    LayerWiseDistributedOptimizer.__init__ = __init__
    LayerWiseDistributedOptimizer.shard_params = shard_params
