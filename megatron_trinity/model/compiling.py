"""Chains of small operations as one kernel: compiled where a GPU has Triton, plain elsewhere.

Others call these through the module, so that a test or a count can take their place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

VARIANTS = 64
"""A function is compiled anew for other strides, dtypes and numbers of dimensions; past so many
torch raises an error. Its default, 8, is what one model with one micro-batch size may need."""


def compiles(tensor: Tensor) -> bool:
    """Whether what is done to such a tensor can be compiled."""
    return tensor.is_cuda and bool(has_triton())


def fitting(function: Callable[..., Any], tensor: Tensor) -> Callable[..., Any]:
    """`function`, compiled if what is done to such a tensor can be."""
    return compiled(function) if compiles(tensor) else function


@cache
def compiled(function: Callable[..., Any], backend: str = "inductor") -> Any:
    """Compiled at its first call, for all sizes but those of parameters."""
    compiling: Any = torch.compile  # whose declared overloads lack the limit
    return compiling(
        function, backend=backend, dynamic=True, fullgraph=True, recompile_limit=VARIANTS
    )
