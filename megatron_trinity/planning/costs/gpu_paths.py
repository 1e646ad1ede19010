"""What a GPU runs where a CPU takes other paths, as far as that can be counted on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.transformer.moe import moe_utils
from torch import Tensor, nn

from megatron_trinity.model import fused_loss, grouped_product, loss
from megatron_trinity.model.norm import TrinityRMSNorm
from megatron_trinity.planning.costs.operations import copy_on_host, one_launch
from megatron_trinity.upstream.registry import rebind

SWIGLU = ("swiglu", "swiglu_back", "weighted_swiglu", "weighted_swiglu_back")


def take_gpu_paths() -> None:
    """Let this process take them from now on; for counting alone.

    A pass of torch's RMSNorm, of its grouped product and of what is compiled (Megatron's SwiGLU,
    the loss of a chunk) is one launch, and what the dispatcher of tokens moves to the host is
    there.
    """
    setattr(nn.functional, "rms_norm", rms_norm)
    setattr(TrinityRMSNorm, "forward", _trinity_norm)
    setattr(grouped_product, "has_kernel", lambda device, dtype: dtype == torch.bfloat16)
    setattr(nn.functional, "grouped_mm", one_launch("grouped_mm", nn.functional.grouped_mm))
    setattr(loss, "is_fused", lambda hidden: hidden.dtype == torch.bfloat16)
    setattr(fused_loss, "compiled", lambda function: one_launch(function.__name__, function))
    for name in SWIGLU:
        function = getattr(fused_bias_swiglu, name)
        setattr(fused_bias_swiglu, name, one_launch(f"fused_{name}", function))
    rebind(moe_utils.maybe_move_tensor_to_cpu, _moved)


def rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    """torch's over the last dimension: a launch each way, which keeps its input and 1/rms."""
    result: Tensor = _Norm.apply(x, weight, torch.finfo(x.dtype).eps if eps is None else eps)
    return result


def norm_forward(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm in one launch: its result, and 1/rms `[..., 1]`."""
    r = x.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
    return (x.float() * r * gain.float()).to(x.dtype), r


def norm_backward(g: Tensor, x: Tensor, gain: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and the gain, in one launch."""
    product = g.float() * x.float()
    of_gain = (product * r).flatten(0, -2).sum(0)
    mean = (product * gain.float()).mean(-1, keepdim=True)
    of_x = r * (g.float() * gain.float() - x.float() * r.square() * mean)
    return of_x.to(x.dtype), of_gain.to(gain.dtype)


norm_forward = one_launch("_fused_rms_norm", norm_forward)
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


class _TrinityNorm(torch.autograd.Function):
    """Trinity's around the same launches: in fp32, and it keeps its input as it is."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gain: Tensor, eps: float) -> Tensor:
        y, r = norm_forward(hidden.float(), gain, eps)
        ctx.save_for_backward(hidden, gain, r)
        return y.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden, gain, r = ctx.saved_tensors
        of_x, of_gain = norm_backward(gradient.float(), hidden.float(), gain, r)
        return of_x.to(hidden.dtype), of_gain, None


def _trinity_norm(self: TrinityRMSNorm, hidden: Tensor) -> Tensor:
    result: Tensor = _TrinityNorm.apply(hidden, self.weight, self.eps)
    return result


def _moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor
    copy = copy_on_host(tensor)  # waited for where the dispatcher does
    return copy.numpy() if as_numpy else copy
