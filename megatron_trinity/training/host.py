"""Values of a step that the host needs, read in one go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same on the host, which waits for the device once.

    What is sent are their bytes: one launch puts them side by side, whatever their types.
    """
    parts = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    read = torch.cat(parts).cpu().split([part.numel() for part in parts])
    return [
        part.clone().view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(read, tensors, strict=True)
    ]
