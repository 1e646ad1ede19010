"""The forms that a GPU takes, on a CPU, with torch's stand-ins for its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import Mock, patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as torchs

from megatron_trinity.model import core_attention, flexible_attention, grouped_product, norm


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
def as_if_norm_kernels() -> Iterator[None]:
    """Take torch's kernels of RMSNorm, with the formula for the backward one, which a CPU lacks."""

    def backward(
        of_output: Tensor, x: Tensor, shape: Any, r: Tensor, w: Tensor, _: Any
    ) -> tuple[Tensor, Tensor]:
        assert {tensor.dtype for tensor in (of_output, x, r, w)} == {torch.float32}
        assert tuple(shape) == w.shape
        along = (of_output * w * x).mean(dim=-1, keepdim=True)
        of_gain = (of_output * x * r).flatten(0, -2).sum(dim=0)
        return r * (of_output * w - x * r.square() * along), of_gain

    library = torch.library.Library("aten", "IMPL")
    library.impl("_fused_rms_norm_backward", backward, "CPU")
    try:
        with patch.object(norm, "has_kernels", lambda hidden: True):
            yield
    finally:
        library._destroy()
