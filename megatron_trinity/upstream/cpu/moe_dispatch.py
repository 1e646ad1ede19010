"""Split sizes of the expert all-to-all as numbers, also when they are computed on the CPU."""

from __future__ import annotations

from typing import Any

import torch

from megatron_trinity.upstream.registry import Adaptation, rebind

ADAPTATION = Adaptation(
    name="cpu-moe-dispatch",
    symbols=("megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu",),
    reason=(
        "`maybe_move_tensor_to_cpu(as_numpy=True)` converts only tensors that come from a CUDA "
        "device, so on the CPU `all_to_all_single` gets tensors where it needs integers"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="the function converts every tensor if `as_numpy` is set",
    when="without_cuda",
    after=("cpu-jit",),
)


def _maybe_move_tensor_to_cpu(
    tensor: Any, as_numpy: bool = False, record_stream: bool = False
) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def install() -> None:
    """Replace the function wherever it was imported."""
    from megatron.core.transformer.moe import moe_utils

    rebind(moe_utils.maybe_move_tensor_to_cpu, _maybe_move_tensor_to_cpu)
