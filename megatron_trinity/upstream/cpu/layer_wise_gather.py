"""The layer-wise optimizer shares its updated parameters over gloo.

Reason: without a parameter layout (`dist_muon`) each rank gathers lists of different sizes, which
NCCL's all-gather takes and gloo's does not.
Written for: megatron-core 0.19.2.
Remove when: the gather pads its lists, or every caller supplies a layout.
"""

from __future__ import annotations

from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer


def install() -> None:
    """Use upstream's own broadcast of each parameter from the rank that updated it."""
    LayerWiseDistributedOptimizer.allgather_params = LayerWiseDistributedOptimizer.broadcast_params
