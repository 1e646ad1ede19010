"""The routed experts of the portable layer spec: all experts of a rank at once.

Parameters, their names and attributes, and checkpoints are those of Megatron's `SequentialMLP`.

Shapes: t tokens of this rank's experts, sorted by expert, e experts, h hidden size, f width of an
expert (of this rank's part of it under expert tensor parallelism).
"""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

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
        gate, up = product(tokens, fc1).chunk(2, dim=-1)
        weighted = F.silu(gate) * up * probabilities.unsqueeze(-1)
        return product(weighted.to(tokens.dtype), fc2), None
