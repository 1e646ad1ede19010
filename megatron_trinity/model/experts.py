"""The routed experts of the portable layer spec: all experts of a rank at once.

Parameters, their names and attributes, and checkpoints are those of Megatron's `SequentialMLP`.

Shapes: t tokens of this rank's experts, sorted by expert, e experts, h hidden size, f width of an
expert (of this rank's part of it under expert tensor parallelism).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_trinity.model.grouped_product import product_by_group


class ColumnParallelWeight(ColumnParallelLinear):
    """A layer whose call returns its weight: the product is made for all experts at once.

    It has to be called all the same, since hooks ahead of the call may still be gathering the
    weight (`--overlap-param-gather`).
    """

    def forward(self) -> Tensor:
        """The weight, `[2f, h]`."""
        return self.weight


class RowParallelWeight(RowParallelLinear):
    """As `ColumnParallelWeight`."""

    def forward(self) -> Tensor:
        """The weight, `[h, f]`."""
        return self.weight


EXPERT_SUBMODULES = MLPSubmodules(linear_fc1=ColumnParallelWeight, linear_fc2=RowParallelWeight)


class GroupedExperts(SequentialMLP):
    """SwiGLU experts; all that lies between the products of matrices is done for all at once."""

    def forward(
        self, tokens: Tensor, tokens_per_expert: Tensor, probabilities: Tensor
    ) -> tuple[Tensor, None]:
        """Each expert's output for its tokens, times their routing probabilities.

        Args:
            tokens: `[t, h]`, those of expert 0 first.
            tokens_per_expert: `[e]` integers that sum up to t.
            probabilities: `[t]`, fp32.
        Returns: `[t, h]` in the dtype of `tokens`, and no bias.
        """
        fc1 = [expert.linear_fc1() for expert in self.local_experts]
        fc2 = [expert.linear_fc2() for expert in self.local_experts]
        product = product_by_group(tokens, tokens_per_expert, (*fc1[0].shape, *fc2[0].shape))
        return product(weighted_swiglu(product(tokens, fc1), probabilities), fc2), None


def weighted_swiglu(gate_and_up: Tensor, probabilities: Tensor) -> Tensor:
    """`silu(gate) * up` times a factor a row.

    Args:
        gate_and_up: `[t, 2f]`.
        probabilities: `[t]`, fp32.
    Returns: `[t, f]` in the dtype of `gate_and_up`.
    """
    result: Tensor = _WeightedSwiGLU.apply(gate_and_up, probabilities)
    return result


class _WeightedSwiGLU(torch.autograd.Function):
    """Autograd's own steps, but with silu and its product computed again and not kept."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor, probabilities: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up, probabilities)
        gate, up = gate_and_up.chunk(2, dim=-1)
        weighted = F.silu(gate) * up * probabilities.unsqueeze(-1)
        return weighted.to(gate_and_up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate_and_up, probabilities = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        of_weighted = gradient.to(probabilities.dtype)
        of_probabilities = (of_weighted * (activated * up)).sum(dim=-1)
        of_product = (of_weighted * probabilities.unsqueeze(-1)).to(gate_and_up.dtype)
        of_both = torch.empty_like(gate_and_up)
        of_gate, of_up = of_both.chunk(2, dim=-1)
        torch.mul(of_product, activated, out=of_up)
        torch.ops.aten.silu_backward.grad_input(of_product.mul_(up), gate, grad_input=of_gate)
        return of_both, of_probabilities
