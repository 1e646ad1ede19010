"""Selective recompute of norms compiles nothing, and needs no Transformer Engine."""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_trinity.upstream.registry import Adaptation, rebind

ADAPTATION = Adaptation(
    name="norm-recompute",
    symbols=(
        "megatron.core.tensor_parallel.random.CheckpointWithoutOutput.__init__",
        "megatron.core.tensor_parallel.random._get_share_storage",
    ),
    reason=(
        "`CheckpointWithoutOutput` takes its default, no fp8, for fp8, and then asks Transformer "
        "Engine about it: a NameError where that is not installed. And it compiles a C++ "
        "extension while it trains, which needs a compiler, ninja and an environment whose path "
        "has no space"
    ),
    written_for="megatron-core 0.19.2",
    remove_when=(
        "`CheckpointWithoutOutput` asks only where Transformer Engine is installed, and compiles "
        "nothing"
    ),
)


def _copy_storage(target: torch.Tensor, source: torch.Tensor) -> None:
    """Give `target`, whose storage was emptied, the bytes of `source`; autograd does not notice."""
    storage = source.untyped_storage()
    target.untyped_storage().resize_(storage.nbytes())
    target.untyped_storage().copy_(storage)


def install() -> None:
    """The output of a norm is copied, not shared; without Transformer Engine nothing is fp8."""
    from megatron.core.tensor_parallel import random as megatron_random

    rebind(megatron_random._get_share_storage, lambda: _copy_storage)
    if megatron_random.HAVE_TE:
        return
    original = megatron_random.CheckpointWithoutOutput.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.fp8 = False

    megatron_random.CheckpointWithoutOutput.__init__ = __init__
