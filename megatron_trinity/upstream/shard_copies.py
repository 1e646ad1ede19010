"""A rank's new weights go into the model's buffers in one copy, not one for each parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from megatron_trinity.upstream.registry import Adaptation

_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer."

ADAPTATION = Adaptation(
    name="shard-copies",
    symbols=(
        f"{_OPTIMIZER}_copy_main_params_to_model_params",
        f"{_OPTIMIZER}_get_model_param_range_map",
    ),
    reason=(
        "the distributed optimizer launches a kernel for each parameter to round its new values "
        "into the buffer that is gathered: of experts that is most of what a step launches "
        "behind its backward pass"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="`_copy_main_params_to_model_params` copies lists of tensors",
)


def install() -> None:
    """Copy lists of tensors."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    name = "_copy_main_params_to_model_params"
    setattr(DistributedOptimizer, name, _at_once(getattr(DistributedOptimizer, name)))


def _at_once(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def copy(self: Any) -> None:
        layout = self.ddp_config
        if (
            self.is_stub_optimizer
            or layout.use_megatron_fsdp
            or layout.fp8_param_gather
            or layout.fp4_param_gather
            or self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        ):
            original(self)
            return
        for masters, parameters in (
            (self.shard_fp32_from_float16_groups, self.model_float16_groups),
            (self.shard_fp32_groups, self.model_fp32_groups),
        ):
            # One dtype each, which is what torch copies in one launch.
            into = [_shard(self, parameter) for parameter in chain(*parameters)]
            if into:
                torch._foreach_copy_(into, list(chain(*masters)))

    return copy


def _shard(optimizer: Any, parameter: Tensor) -> Tensor:
    """This rank's part of a parameter in the buffer that is gathered."""
    place = optimizer._get_model_param_range_map(parameter)["gbuf_world_in_bucket"]
    buffer, _, bucket = optimizer.model_param_gbuf_map[parameter]
    weights: Tensor = optimizer.buffers[buffer].buckets[bucket].param_data
    return weights.view(-1)[place.start : place.end].detach()
