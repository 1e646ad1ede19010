"""The routed experts of the portable layer spec: one product over all experts of a rank.

Parameters, their names and attributes, and checkpoints are those of Megatron's `SequentialMLP`.

Shapes: t tokens of this rank's experts, sorted by expert, e experts, h hidden size, f width of an
expert (of this rank's part of it under expert tensor parallelism).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.autograd.function import once_differentiable


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
        counts = tokens_per_expert.tolist()
        fc1 = [expert.linear_fc1() for expert in self.local_experts]
        fc2 = [expert.linear_fc2() for expert in self.local_experts]
        gate, up = grouped_linear(tokens, counts, fc1).chunk(2, dim=-1)
        weighted = F.silu(gate) * up * probabilities.unsqueeze(-1)
        return grouped_linear(weighted.to(tokens.dtype), counts, fc2), None


def grouped_linear(tokens: Tensor, counts: Sequence[int], weights: Sequence[Tensor]) -> Tensor:
    """Multiply each group of rows by its own matrix.

    Args:
        tokens: `[t, i]`, sorted by group.
        counts: rows of each group, t in all.
        weights: for each group, `[o, i]`.
    Returns: `[t, o]`.
    """
    result: Tensor = _GroupedLinear.apply(tokens, counts, *weights)
    return result


class _GroupedLinear(torch.autograd.Function):
    """A product for each group, all into one tensor, in both directions."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, counts: Sequence[int], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, *weights)
        ctx.counts = counts
        output = tokens.new_empty(tokens.shape[0], weights[0].shape[0])
        parts = zip(output.split(counts), tokens.split(counts), weights, strict=True)
        for out, rows, weight in parts:
            torch.mm(rows, weight.t(), out=out)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, *weights = ctx.saved_tensors
        of_tokens = torch.empty_like(tokens)
        of_weights = []
        for of_rows, rows, weight, of_output in zip(
            of_tokens.split(ctx.counts),
            tokens.split(ctx.counts),
            weights,
            gradient.split(ctx.counts),
            strict=True,
        ):
            torch.mm(of_output, weight, out=of_rows)
            # Zeros, not None, for an expert without tokens, as Megatron's linear layers give.
            of_weights.append(of_output.t() @ rows)
        return of_tokens, None, *of_weights
