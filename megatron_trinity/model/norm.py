"""RMSNorm with an fp32 gain, and the post-norm half of the sandwich norm.

Shapes: `[s, b, h]` hidden states, `[s, b, heads, head_dim]` for the norms of queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_trinity.model.architecture import post_norm_gain


class TrinityRMSNorm(nn.Module):
    """RMSNorm over the last dimension, computed in fp32, with a gain that stays fp32.

    Built like every Megatron norm: `TrinityRMSNorm(config=..., hidden_size=..., eps=...)`.
    The gain keeps its fp32 dtype when the model is cast to bf16, as transformers'
    `AfmoeForCausalLM` keeps it (`_keep_in_fp32_modules`).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=torch.float32))
        # Under sequence parallelism a rank sees part of the tokens, and Megatron sums gradients
        # that are marked like this.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise `hidden` over its last dimension; same shape and dtype out."""
        if hidden.is_cuda:
            return self.on_gpu(hidden)
        result: Tensor = _RMSNorm.apply(hidden, self.weight, self.eps)
        return result

    def on_gpu(self, hidden: Tensor) -> Tensor:
        """The same where torch has one kernel for each pass."""
        normed = F.rms_norm(hidden.float(), self.weight.shape, self.weight, self.eps)
        return normed.to(hidden.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrinityRMSNorm:
        # A cast to bf16 and back would round the gain: keep its value, follow only the device.
        exact = self.weight.detach()
        super()._apply(fn, recurse)
        if self.weight.dtype != torch.float32:
            self.weight.data = exact.to(self.weight.device)
        return self


class _RMSNorm(torch.autograd.Function):
    """RMSNorm with a backward in few passes: on a CPU, autograd's of the formula takes most of it.

    With r = 1 / sqrt(mean(x^2) + eps) and y = x r w, for the gradient g of y:
    dx = r (g w - x r^2 mean(g x w)) and dw = sum over tokens of g x r.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gain: Tensor, eps: float) -> Tensor:
        x = hidden.float()
        squares = x.square()
        reciprocal = squares.mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, gain, reciprocal)
        # In the place of the squares, which are not needed any more.
        return torch.mul(x, reciprocal, out=squares).mul_(gain).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, gain, reciprocal = ctx.saved_tensors
        x, g = (tensor.float().reshape(-1, gain.numel()) for tensor in (hidden, gradient))
        r = reciprocal.flatten()
        product = g * x
        of_gain = r @ product
        along_x = (product @ gain).mul_(r.square()).div_(gain.numel())
        of_x = torch.mul(g, gain, out=product)
        of_x.addcmul_(x, along_x.unsqueeze(1), value=-1).mul_(r.unsqueeze(1))
        return of_x.to(hidden.dtype).view(hidden.shape), of_gain, None


class PostNormAdd(nn.Module):
    """`residual + RMSNorm(sublayer output)`: the outer half of the sandwich norm.

    It takes the place of Megatron's bias-dropout-add, so that one module covers the attention, the
    dense MLP and the sum of shared and routed experts. Its gain starts at 1/sqrt(L), L the number
    of transformer layers, the same at every depth (report, eq. 33-35).
    """

    def __init__(
        self, config: TransformerConfig, norm: Callable[..., Any] = TrinityRMSNorm
    ) -> None:
        super().__init__()
        self.norm = norm(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        nn.init.constant_(self.norm.weight, post_norm_gain(config.num_layers))

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Return the add, as `megatron.core.fusions.fused_bias_dropout.get_bias_dropout_add` does.

        Trinity has neither biases nor dropout, so `training` and `fused` change nothing.
        """
        return self._add

    def _add(
        self, output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
    ) -> Tensor:
        output, bias = output_with_bias
        if bias is not None or dropout:
            raise ValueError("Trinity's sublayers have no bias and no dropout")
        return residual + self.norm(output)
