"""RMSNorm with an fp32 gain, and the post-norm half of the sandwich norm.

Shapes: `[s, b, h]` hidden states, `[s, b, heads, head_dim]` for the norms of queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_trinity.model import compiling
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

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise `hidden` over its last dimension; same shape and dtype out.

        With `residual`, of the same shape and dtype, the result is added to it.
        """
        result: Tensor = _RMSNorm.apply(hidden, self.weight, self.eps, residual)
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrinityRMSNorm:
        # A cast to bf16 and back would round the gain: keep its value, follow only the device.
        exact = self.weight.detach()
        super()._apply(fn, recurse)
        if self.weight.dtype != torch.float32:
            self.weight.data = exact.to(self.weight.device)
        return self


class _RMSNorm(torch.autograd.Function):
    """RMSNorm with a backward in few passes: on a CPU, autograd's of the formula takes most of it.

    It keeps `hidden` as it is, where torch's own would keep an fp32 copy. Compiled it is one kernel
    each way, which torch's is not: its gain would have to have the dtype of `hidden`.

    With r = 1 / sqrt(mean(x^2) + eps) and y = x r w, for the gradient g of y:
    dx = r (g w - x r^2 mean(g x w)) and dw = sum over tokens of g x r.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, gain: Tensor, eps: float, residual: Tensor | None
    ) -> Tensor:
        if compiling.compiles(hidden):
            others = [] if residual is None else [residual.detach()]
            # Detached, since it would be compiled once more for each that has no gradient.
            result: Tensor
            result, reciprocal = compiling.compiled(normalise)(hidden.detach(), gain, eps, *others)
            ctx.save_for_backward(hidden, gain, reciprocal)
            return result
        x = hidden.float()
        squares = x.square()
        reciprocal = squares.mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, gain, reciprocal)
        # In the place of the squares, which are not needed any more.
        normed = torch.mul(x, reciprocal, out=squares).mul_(gain).to(hidden.dtype)
        return normed if residual is None else residual + normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
        hidden, gain, reciprocal = ctx.saved_tensors
        of_residual = gradient if ctx.needs_input_grad[3] else None
        if compiling.compiles(hidden):
            of_x, of_gain = compiling.compiled(norm_gradients)(
                gradient, hidden.detach(), gain, reciprocal
            )
            return of_x, of_gain, None, of_residual
        x, g = (tensor.float().reshape(-1, gain.numel()) for tensor in (hidden, gradient))
        r = reciprocal.flatten()
        product = g * x
        of_gain = r @ product
        along_x = (product @ gain).mul_(r.square()).div_(gain.numel())
        of_x = torch.mul(g, gain, out=product)
        of_x.addcmul_(x, along_x.unsqueeze(1), value=-1).mul_(r.unsqueeze(1))
        return of_x.to(hidden.dtype).view(hidden.shape), of_gain, None, of_residual


def normalise(
    hidden: Tensor, gain: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RMSNorm as a formula to compile: its result, and 1/rms `[..., 1]` fp32."""
    x = hidden.float()
    reciprocal = x.square().mean(-1, keepdim=True).add(eps).rsqrt()
    normed = (x * reciprocal * gain).to(hidden.dtype)
    return normed if residual is None else residual + normed, reciprocal


def norm_gradients(
    gradient: Tensor, hidden: Tensor, gain: Tensor, reciprocal: Tensor
) -> tuple[Tensor, Tensor]:
    """Of `hidden`, in its dtype, and of the gain: a formula to compile."""
    normed, weighted = hidden.float() * reciprocal, gradient.float() * gain
    along = (weighted * normed).mean(-1, keepdim=True)
    of_gain = (gradient.float() * normed).sum(tuple(range(hidden.dim() - 1)))
    return ((weighted - normed * along) * reciprocal).to(hidden.dtype), of_gain


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
        result: Tensor = self.norm(output, residual)
        return result
