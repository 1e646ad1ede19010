"""Split sizes of the expert all-to-all as numbers, also when they are computed on the CPU.

Reason: `maybe_move_tensor_to_cpu(as_numpy=True)` converts only tensors that come from a CUDA
device, so on the CPU `all_to_all_single` gets tensors where it needs integers.
Written for: megatron-core 0.19.2.
Remove when: the function converts every tensor if `as_numpy` is set.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils

from megatron_trinity.upstream.registry import rebind


def _maybe_move_tensor_to_cpu(
    tensor: Any, as_numpy: bool = False, record_stream: bool = False
) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def install() -> None:
    """Replace the function wherever it was imported."""
    rebind(moe_utils.maybe_move_tensor_to_cpu, _maybe_move_tensor_to_cpu)
