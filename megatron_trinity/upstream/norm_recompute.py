"""Selective recompute of norms without Transformer Engine.

Reason: `CheckpointWithoutOutput` takes its default, no fp8, for fp8, and then asks Transformer
Engine about it: a NameError where that is not installed.
Written for: megatron-core 0.19.2.
Remove when: `CheckpointWithoutOutput` asks only where Transformer Engine is installed.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.tensor_parallel import random as megatron_random


def install() -> None:
    """Without Transformer Engine nothing is fp8."""
    if megatron_random.HAVE_TE:
        return
    original = megatron_random.CheckpointWithoutOutput.__init__

    @functools.wraps(original)
    def __init__(self: megatron_random.CheckpointWithoutOutput, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.fp8 = False

    megatron_random.CheckpointWithoutOutput.__init__ = __init__
