"""The functions over lists of tensors that Adam and the clipping of gradients call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.transformer_engine.emulation.extension import emulates

Lists = Sequence[Sequence[Tensor]]


@emulates
def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Norm of all tensors together, and with `per_tensor` of each."""
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else norms[:0]


@emulates
def multi_tensor_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, scale: float
) -> None:
    """Second list = first list times `scale`; sets the flag where a value is not finite."""
    for source, target in zip(*tensor_lists, strict=True):
        if not torch.isfinite(source).all():
            noop_flag.fill_(1)
        target.copy_(source.float() * scale)


@emulates
def multi_tensor_scale_tensor(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, scale: Tensor
) -> None:
    """As `multi_tensor_scale`."""
    multi_tensor_scale(chunk_size, noop_flag, tensor_lists, float(scale))


@emulates
def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """A step of Adam; gradients, parameters, moments, and where there are some fp32 masters.

    `mode` 1 decays weights beside the gradient (AdamW), 0 through it.
    """
    first = 1 - beta1**step if bias_correction else 1.0
    second = 1 - beta2**step if bias_correction else 1.0
    for gradient, parameter, mean, square, *master in zip(*tensor_lists, strict=True):
        value = (master[0] if master else parameter).float()
        g = gradient.float() if mode else gradient.float() + weight_decay * value
        m = mean.float().lerp(g, 1 - beta1)
        v = square.float() * beta2 + g.square() * (1 - beta2)
        value = value * (1 - lr * weight_decay) if mode else value
        value = value - lr * (m / first) / ((v / second).sqrt() + epsilon)
        mean.copy_(m)
        square.copy_(v)
        for target in (parameter, *master):
            target.copy_(value)
