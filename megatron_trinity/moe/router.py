"""Trinity's router: sigmoid scores, a bias that only selects, weights that sum to the route scale.

Shapes: t tokens, s tokens of a sequence on this rank, b sequences, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_trinity.moe.balancing import sign_update, smebu_update
from megatron_trinity.moe.sequence_loss import (
    RoutedDocuments,
    document_balance_loss,
    sequence_balance_loss,
)

NORMALIZATION_EPS = 1e-20  # as transformers' AfmoeTokenChoiceRouter has it
MOMENTUM = "expert_bias_momentum"
"""SMEBU's momentum: the buffer's name, and the key under which a checkpoint's metadata says that
the checkpoint has it."""


def sigmoid_topk(
    logits: Tensor,
    expert_bias: Tensor,
    topk: int,
    route_scale: float,
    padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose experts and weigh them (report, eq. 16-18; the scale as the released code has it).

    Args:
        logits: `[t, E]`.
        expert_bias: `[E]` fp32, added to the scores for the choice alone.
        topk: k.
        route_scale: sum of a token's weights.
        padding: `[t]` bool, tokens that go to the experts in turn. The dispatchers want k experts
            of each token, and padding, which is one token over and over, would choose the same.
    Returns: weights `[t, E]` fp32, zero where an expert is not chosen, and the choice `[t, E]`
        bool.
    """
    scores = torch.sigmoid(logits.float())
    chosen = torch.topk(scores + expert_bias, k=topk, dim=1).indices
    if padding is not None:
        first = topk * padding.cumsum(0).unsqueeze(1)
        in_turn = (first + torch.arange(topk, device=first.device)) % scores.shape[1]
        chosen = torch.where(padding.unsqueeze(1), in_turn, chosen)
    weights = scores.gather(1, chosen)
    weights = weights / (weights.sum(dim=1, keepdim=True) + NORMALIZATION_EPS) * route_scale
    return (
        torch.zeros_like(scores).scatter(1, chosen, weights),
        torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True),
    )


def balance(routers: Sequence[TrinityRouter], counts: Tensor) -> None:
    """Move the bias of each router once, of all at once.

    Args:
        routers: of layers with one configuration.
        counts: `[len(routers), E]` int64, tokens of a whole global batch.
    """
    if not routers or routers[0].config.load_balancing == "none":
        return
    config = routers[0].config
    biases = [router.expert_bias for router in routers]
    if config.load_balancing == "sign":
        bias = sign_update(torch.stack(biases), counts, config.moe_router_bias_update_rate)
    else:
        momenta = [router.expert_bias_momentum for router in routers]
        constants = (config.smebu_kappa, config.smebu_lambda, config.smebu_beta)
        bias, momentum = smebu_update(torch.stack(biases), torch.stack(momenta), counts, *constants)
        torch._foreach_copy_(momenta, momentum.unbind())
    torch._foreach_copy_(biases, bias.unbind())


class TrinityRouter(TopKRouter):
    """Megatron's router with Trinity's choice, weights, balance and exact state.

    State, beside the gate's weight:
        expert_bias: `[E]` fp32, saved. Moved by `balance` once an optimizer step.
        expert_bias_momentum: `[E]` fp32, saved; with `load_balancing` smebu only.
        tokens_per_expert: `[E]` int64, not saved; tokens that this rank has routed in training
            since the last `take_counts`. Megatron's own `local_tokens_per_expert` is empty: it is
            a float, which a bf16 model rounds above 256, and forgotten before the step is taken.
        sequence_loss: fp32, not saved; this rank's part of the sequence-wise losses since the last
            `take_sequence_loss`, before the coefficient. Of documents in a sequence it is the mean,
            weighted by their tokens.
        documents: those of the micro-batch that is routed next, or None if sequences are whole;
            `TrinityLayer` sets it.

    Evaluation changes none of them. Casts of the model to another precision leave their dtypes and
    values alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Megatron would move the bias before it is known whether the step is applied.
        self.frozen_expert_bias = True
        # What it counts with, and empties in every step, a launch for each layer, is not used.
        self.local_tokens_per_expert = self.expert_bias.new_empty(0)
        counts = torch.zeros_like(self.expert_bias, dtype=torch.int64)
        self.register_buffer("tokens_per_expert", counts, persistent=False)
        momentum = self.config.load_balancing == "smebu"
        self.register_buffer(MOMENTUM, torch.zeros_like(self.expert_bias) if momentum else None)
        self.register_buffer("sequence_loss", self.expert_bias.new_zeros(()), persistent=False)
        self.documents: RoutedDocuments | None = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route `[s, b, E]` logits; returns weights and choice, both `[s * b, E]`.

        `padding_mask`, `[s, b]`, is true for tokens that count neither for the load of experts nor
        for the sequence-wise loss.
        """
        weights, chosen = sigmoid_topk(
            logits.view(-1, self.num_experts),
            self.expert_bias,
            self.topk,
            self.config.moe_router_topk_scaling_factor or 1.0,
            None if padding_mask is None else padding_mask.reshape(-1),
        )
        # Recompute runs the first pass without gradients, so that a token counts once.
        if self.training and torch.is_grad_enabled():
            self._count(chosen, padding_mask)
            if self.config.seq_aux_loss_coeff:
                weights = self._with_sequence_loss(weights, logits, chosen, padding_mask)
        return weights, chosen

    def take_counts(self) -> Tensor:
        """Tokens that this rank has routed to each expert, `[E]` int64; starts again from zero."""
        counts = self.tokens_per_expert.clone()
        self.tokens_per_expert.zero_()
        return counts

    def take_sequence_loss(self) -> Tensor:
        """This rank's part of the sum of sequence-wise losses; starts again from zero."""
        loss = self.sequence_loss.clone()
        self.sequence_loss.zero_()
        return loss

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """Megatron's, with the momentum only where the checkpoint has or will have it."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if not (metadata or {}).get(MOMENTUM):
            state.pop(prefix + MOMENTUM, None)
        return state

    def _count(self, chosen: Tensor, padding_mask: Tensor | None) -> None:
        with torch.no_grad():
            if padding_mask is not None:
                chosen = chosen & ~padding_mask.reshape(-1, 1)
            self.tokens_per_expert += chosen.sum(dim=0)

    def _with_sequence_loss(
        self, weights: Tensor, logits: Tensor, chosen: Tensor, padding_mask: Tensor | None
    ) -> Tensor:
        if padding_mask is not None and self.documents is None:
            raise ValueError("the sequence-wise loss needs documents where there is padding")
        arguments = (logits.float(), chosen.view(logits.shape), self.topk, self.tp_cp_group)
        tokens = logits.shape[0] * self.tp_cp_group.size()
        if self.documents is None:
            loss = sequence_balance_loss(*arguments).sum()
            self.sequence_loss += loss.detach()
        else:
            ids, lengths, counted, shares = self.documents
            losses = document_balance_loss(*arguments, ids, lengths)
            loss = (losses * counted).sum() / tokens
            self.sequence_loss += (losses.detach() * shares).sum()
        # Megatron divides all gradients by the tokens of the global batch: a sequence weighs as
        # much as its tokens do, whatever the micro-batch.
        scaled = self.config.seq_aux_loss_coeff * tokens * loss
        result: Tensor = MoEAuxLossAutoScaler.apply(weights, scaled)
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrinityRouter:
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if after.dtype != before.dtype:
                # Follow the device alone; from and to meta there is no value to keep.
                valueless = after.is_meta or before.is_meta
                self._buffers[name] = (
                    after.to(before.dtype) if valueless else before.to(after.device)
                )
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.expert_bias_momentum is not None and prefix + MOMENTUM not in state_dict:
            # A checkpoint of another rule: SMEBU starts from zero.
            state_dict[prefix + MOMENTUM] = torch.zeros_like(self.expert_bias_momentum)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
