"""The forms that a GPU takes, on a CPU, with torch's stand-ins for its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import Mock, patch

import torch.nn.functional as F
from torch.nn.attention import flex_attention as torchs

from megatron_trinity.model import compiling, core_attention, flexible_attention, grouped_product


@contextmanager
def as_if_kernel(there: bool = True) -> Iterator[Mock]:
    """Take torch's grouped product, or do not; yields what counts its calls."""
    with (
        patch.object(grouped_product, "has_kernel", lambda device, dtype: there),
        patch.object(F, "grouped_mm", wraps=F.grouped_mm) as calls,
    ):
        yield calls


@contextmanager
def as_if_flexible(block: int = 8) -> Iterator[Mock]:
    """Take block masks, for which torch refuses gradients on a CPU; yields what counts calls."""
    with ExitStack() as patches:
        patches.enter_context(patch.object(torchs, "_validate_device", lambda *tensors: None))
        patches.enter_context(
            patch.object(torchs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", new=True)
        )
        patches.enter_context(patch.object(flexible_attention, "BLOCK", block))
        flexible_attention.window_mask.cache_clear()
        patches.callback(flexible_attention.window_mask.cache_clear)
        calls = Mock(wraps=torchs.flex_attention)
        patches.enter_context(patch.object(flexible_attention, "kernel", lambda: calls))
        patches.enter_context(patch.object(core_attention, "is_flexible", lambda query: True))
        yield calls


@contextmanager
def as_if_compiled() -> Iterator[None]:
    """Take the formulas that are compiled, as they are."""
    with (
        patch.object(compiling, "compiles", lambda tensor: True),
        patch.object(compiling, "compiled", lambda function: function),
    ):
        yield
