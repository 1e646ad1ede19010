"""Exact token counts and an fp32 expert bias in the router, whatever the model is cast to.

Reason: the router keeps both as fp32 buffers, and `Float16Module` casts every floating buffer.
 - `local_tokens_per_expert` stays in bf16: above 256 tokens an expert the counts are rounded, and
   the sign that moves the expert bias can be the wrong one.
 - `expert_bias` comes back to fp32 with the first forward pass only: what the cast rounded is lost,
   and a checkpoint loaded before that pass is rounded too.
Written for: megatron-core 0.19.2.
Remove when: the counts are integers, and casting the model leaves `expert_bias` alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter

FP32_BUFFERS = ("expert_bias",)


def install() -> None:
    """Make the counts int64, and keep the bias in fp32 through casts of the module."""
    original_init = TopKRouter.__init__
    original_apply = TopKRouter._apply

    @functools.wraps(original_init)
    def __init__(self: TopKRouter, *args: Any, **kwargs: Any) -> None:
        original_init(self, *args, **kwargs)
        if self.local_tokens_per_expert is not None:
            # A cast of the module changes only floating tensors.
            self.local_tokens_per_expert = self.local_tokens_per_expert.to(torch.int64)

    @functools.wraps(original_apply)
    def _apply(
        self: TopKRouter, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> TopKRouter:
        before = {name: self._buffers.get(name) for name in FP32_BUFFERS}
        original_apply(self, fn, recurse)
        for name, buffer in before.items():
            after = self._buffers.get(name)
            if buffer is None or after is None or after.dtype == buffer.dtype:
                continue
            moved = after.is_meta or buffer.is_meta
            self._buffers[name] = after.to(buffer.dtype) if moved else buffer.to(after.device)
        return self

    TopKRouter.__init__ = __init__
    TopKRouter._apply = _apply
