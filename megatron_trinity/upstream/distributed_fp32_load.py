"""Loading the distributed optimizer of an fp32 model.

Reason: its shards are views of parameters that require gradients, and the default checkpoint
format of `torch_dist` copies into them with gradients enabled: "a view of a leaf Variable that
requires grad is being used in an in-place operation".
Written for: megatron-core 0.19.2.
Remove when: `load_parameter_state_from_dp_reshardable` runs under `torch.no_grad()`, as its
siblings for the other formats do.
"""

from __future__ import annotations

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def install() -> None:
    """Load without gradients."""
    DistributedOptimizer.load_parameter_state_from_dp_reshardable = torch.no_grad()(
        DistributedOptimizer.load_parameter_state_from_dp_reshardable
    )
