"""The gradient norm without Transformer Engine or Apex reads nothing on the host on its way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_trinity.upstream.registry import Adaptation, rebind

ADAPTATION = Adaptation(
    name="local-norms",
    symbols=("megatron.core.utils.local_multi_tensor_l2_norm",),
    reason=(
        "without their kernels the norm is put together on the host, which waits for the device "
        "once for every parameter of a rank, in every step"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="`local_multi_tensor_l2_norm` stays on the device",
)


def l2_norm(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Sequence[Sequence[Tensor]],
    per_tensor: bool,
    *_: Any,
) -> tuple[Tensor, None]:
    """Of all tensors, `[1]` fp32 on their device, in upstream's numbers; not of single ones."""
    norms = [torch.stack(torch._foreach_norm(list(some))).float() for some in tensor_lists]
    return torch.norm(torch.stack(norms)).view(1), None


def install() -> None:
    """Replace the function wherever it stands for the kernel."""
    from megatron.core import utils

    rebind(utils.local_multi_tensor_l2_norm, l2_norm)
