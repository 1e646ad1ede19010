"""Expert balance over all ranks: exact counts of a global batch, and one update of every bias.

Shapes: L layers of the model, E experts.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model
from megatron.training.utils import print_rank_0
from torch import Tensor

from megatron_trinity.errors import TrinityError
from megatron_trinity.moe.router import TrinityRouter


@dataclass(frozen=True)
class StepBalance:
    """What one optimizer step did to the experts, the same on every rank.

    Attributes:
        layers: 1-based numbers of the MoE layers, ascending.
        counts: `[len(layers), E]` int64, tokens of the global batch that each expert got.
        bias: `[len(layers), E]` fp32, after the update.
        sequence_losses: `[len(layers)]` fp32, sums over the sequences of the global batch, before
            the coefficient.
    """

    layers: tuple[int, ...]
    counts: Tensor
    bias: Tensor
    sequence_losses: Tensor


def routers(model: Sequence[Any]) -> list[TrinityRouter]:
    """The routers of this rank's model chunks, wrapped or not."""
    return [
        module
        for chunk in model
        for module in get_attr_wrapped_model(chunk, "modules")()
        if isinstance(module, TrinityRouter)
    ]


def balance_experts(model: Sequence[Any], num_layers: int, applied: bool) -> StepBalance:
    """Count the step's tokens over all ranks, and move the biases if the step was applied.

    To be called on every rank after every optimizer step. A step that was skipped leaves biases and
    momentum as they were, and its tokens are forgotten.
    """
    local = routers(model)
    experts = local[0].num_experts if local else 0
    rows = torch.tensor([experts], device=torch.cuda.current_device())
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if pipeline.size() > 1:  # a stage of dense layers alone does not know
        dist.all_reduce(rows, op=dist.ReduceOp.MAX, group=pipeline)
    counts = torch.zeros(num_layers, int(rows), dtype=torch.int64, device=rows.device)
    bias = torch.zeros(num_layers, int(rows), device=rows.device)
    losses = torch.zeros(num_layers, device=rows.device)
    if local:
        numbers = [router.layer_number - 1 for router in local]
        counts[numbers] = torch.stack([router.take_counts() for router in local])
        losses[numbers] = torch.stack([router.take_sequence_loss() for router in local])
        # Every rank that has routed tokens of these layers: tensor (its parts of the sequence),
        # context and data parallel; expert parallelism divides the same ranks otherwise.
        group = local[0].tp_dp_cp_group
        dist.all_reduce(counts, group=group)
        dist.all_reduce(losses, group=group)
        if applied:
            for router in local:
                router.balance(counts[router.layer_number - 1])
        bias[numbers] = torch.stack([router.expert_bias for router in local])
    if pipeline.size() > 1:
        for tensor in (counts, bias, losses):
            dist.all_reduce(tensor, group=pipeline)
    routed = torch.nonzero(counts.sum(dim=1)).flatten()
    return StepBalance(
        layers=tuple((routed + 1).tolist()),
        counts=counts[routed],
        bias=bias[routed],
        sequence_losses=losses[routed],
    )


def forget_counts(model: Sequence[Any]) -> None:
    """Start again from zero, as if nothing had been routed since the last optimizer step."""
    for router in routers(model):
        router.take_counts()
        router.take_sequence_loss()


def announce_balance(args: Namespace, model: Sequence[Any]) -> Sequence[Any]:
    """Say which rule balances how many layers; a hook on the model before it is wrapped.

    Raises:
        TrinityError: not every MoE layer has a router that can be balanced.
    """
    number = torch.tensor([len(routers(model))], device=torch.cuda.current_device())
    dist.all_reduce(number, group=parallel_state.get_pipeline_model_parallel_group())
    if int(number) != sum(args.moe_layer_freq):
        raise TrinityError(
            f"{int(number)} of {sum(args.moe_layer_freq)} MoE layers have a router that can be "
            "balanced; each needs a TrinityRouter in its layer spec"
        )
    rule = {
        "sign": f"by the sign rule, step {args.moe_router_bias_update_rate:g}",
        "smebu": f"by SMEBU, kappa {args.smebu_kappa:g}, lambda {args.smebu_lambda:g}, "
        f"beta {args.smebu_beta:g}",
        "none": "not balanced: their expert bias stays as it is",
    }[args.load_balancing]
    print_rank_0(f"> experts of {int(number)} MoE layers: {rule}")
    return model
