"""What a GPU runs where a CPU takes other paths, as far as that can be counted on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.transformer.moe import moe_utils
from torch import Tensor, nn

from megatron_trinity.model import (
    compiling,
    core_attention,
    flexible_attention,
    grouped_product,
    norm,
)
from megatron_trinity.planning.costs.flexible import flexible
from megatron_trinity.planning.costs.operations import copy_on_host, one_launch
from megatron_trinity.upstream.registry import rebind

SWIGLU = ("swiglu", "swiglu_back", "weighted_swiglu", "weighted_swiglu_back")


def take_gpu_paths() -> None:
    """Let this process take them from now on; for counting alone.

    A pass of torch's RMSNorm, of its grouped product and of what is compiled (Megatron's SwiGLU,
    norms, the loss of a chunk) is one launch, flexible attention is one and two, and what the
    dispatcher of tokens moves to the host is there.
    """
    setattr(nn.functional, "rms_norm", rms_norm)
    setattr(compiling, "compiles", lambda tensor: True)
    setattr(compiling, "compiled", _one_kernel)
    setattr(core_attention, "is_flexible", lambda query: query.dtype == torch.bfloat16)
    setattr(flexible_attention, "kernel", lambda: flexible)
    made_once = one_launch("window_mask", core_attention.window_mask, lambda *_: 0)
    setattr(core_attention, "window_mask", made_once)
    setattr(grouped_product, "has_kernel", lambda device, dtype: dtype == torch.bfloat16)
    setattr(nn.functional, "grouped_mm", one_launch("grouped_mm", nn.functional.grouped_mm))
    for name in SWIGLU:
        function = getattr(fused_bias_swiglu, name)
        setattr(fused_bias_swiglu, name, one_launch(f"fused_{name}", function))
    rebind(moe_utils.maybe_move_tensor_to_cpu, _moved)


def _one_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `compiled`."""
    return one_launch(function.__name__, function)


def rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    """torch's over the last dimension: a launch each way, which keeps its input and 1/rms."""
    result: Tensor = _Norm.apply(x, weight, torch.finfo(x.dtype).eps if eps is None else eps)
    return result


def norm_backward(g: Tensor, x: Tensor, gain: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and the gain, in their dtypes."""
    of_x, of_gain = norm.norm_gradients(g, x, gain, r)
    return of_x, of_gain.to(gain.dtype)


norm_forward = one_launch("_fused_rms_norm", norm.normalise)
norm_backward = one_launch("_fused_rms_norm_backward", norm_backward)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        y: Tensor
        y, r = norm_forward(x, gain, eps)
        ctx.save_for_backward(x, gain, r)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return *norm_backward(gradient, *ctx.saved_tensors), None


def _moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor
    copy = copy_on_host(tensor)  # waited for where the dispatcher does
    return copy.numpy() if as_numpy else copy
