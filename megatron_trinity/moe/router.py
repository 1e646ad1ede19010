"""Trinity's router: sigmoid scores, a bias that only selects, weights that sum to the route scale.

Shapes: t tokens, E experts, k experts per token.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

NORMALIZATION_EPS = 1e-20  # as transformers' AfmoeTokenChoiceRouter has it


def sigmoid_topk(
    logits: Tensor, expert_bias: Tensor, topk: int, route_scale: float
) -> tuple[Tensor, Tensor]:
    """Choose experts and weigh them (report, eq. 16-18; the scale as the released code has it).

    Args:
        logits: `[t, E]`.
        expert_bias: `[E]` fp32, added to the scores for the choice alone.
        topk: k.
        route_scale: sum of a token's weights.
    Returns: weights `[t, E]` fp32, zero where an expert is not chosen, and the choice `[t, E]`
    bool.
    """
    scores = torch.sigmoid(logits.float())
    chosen = torch.topk(scores + expert_bias, k=topk, dim=1).indices
    weights = scores.gather(1, chosen)
    weights = weights / (weights.sum(dim=1, keepdim=True) + NORMALIZATION_EPS) * route_scale
    return (
        torch.zeros_like(scores).scatter(1, chosen, weights),
        torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True),
    )


class TrinityRouter(TopKRouter):
    """Megatron's router with Trinity's choice and weights.

    Megatron leaves the weight of top-1 routing unnormalised, and has no exact counterpart of the
    released code's epsilon; all else (gating in fp32, the bias, token counts) is its own.
    """

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route `[s, b, E]` logits; returns weights and choice, both `[s * b, E]`.

        `padding_mask`, `[s, b]`, is true for tokens that do not count for the load of experts.
        """
        weights, chosen = sigmoid_topk(
            logits.view(-1, self.num_experts),
            self.expert_bias,
            self.topk,
            self.config.moe_router_topk_scaling_factor or 1.0,
        )
        padding = None if padding_mask is None else padding_mask.reshape(-1, 1)
        self._apply_expert_bias(chosen, padding_mask=padding)
        return weights, chosen
