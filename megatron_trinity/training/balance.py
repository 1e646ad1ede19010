"""Expert balance over all ranks: exact counts of a global batch, and one update of every bias.

Shapes: L layers of the model, E experts.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model
from megatron.training.utils import print_rank_0
from torch import Tensor

from megatron_trinity.errors import TrinityError
from megatron_trinity.moe.router import TrinityRouter, balance


@dataclass(frozen=True)
class StepBalance:
    """What one optimizer step did to the experts, the same on every rank.

    Attributes:
        layers: 1-based numbers of the MoE layers, ascending.
        counts: `[len(layers), E]` int64, tokens of the global batch that each expert got.
        bias: `[len(layers), E]` fp32, after the update.
        sequence_losses: `[len(layers)]` fp32, sums over the sequences of the global batch, before
            the coefficient.
        told: what was given to be summed over all ranks; None if nothing was.
    """

    layers: tuple[int, ...]
    counts: Tensor
    bias: Tensor
    sequence_losses: Tensor
    told: Tensor | None = None


def routers(model: Sequence[Any]) -> list[TrinityRouter]:
    """The routers of this rank's model chunks, wrapped or not."""
    return [
        module
        for chunk in model
        for module in get_attr_wrapped_model(chunk, "modules")()
        if isinstance(module, TrinityRouter)
    ]


def moe_layers(args: Namespace) -> tuple[int, ...]:
    """1-based numbers of the MoE layers of the whole model, ascending."""
    return tuple(number for number, is_moe in enumerate(args.moe_layer_freq, 1) if is_moe)


def balance_experts(
    model: Sequence[Any],
    layers: Sequence[int],
    num_experts: int,
    applied: bool,
    told: Tensor | None = None,
) -> StepBalance:
    """Count the step's tokens over all ranks, and move the biases if the step was applied.

    To be called on every rank after every optimizer step. A step that was skipped leaves biases and
    momentum as they were, and its tokens are forgotten. The host waits for nothing.

    Args:
        layers: `moe_layers` of the model.
        num_experts: E.
        told: `[any]` int64, summed over all ranks in the same exchange.
    """
    device = torch.cuda.current_device()
    local = {router.layer_number: router for router in routers(model)}
    counted = {number: router.tokens_per_expert for number, router in local.items()}
    lost = {number: router.sequence_loss for number, router in local.items()}
    blank = partial(torch.zeros, device=device)
    counts = _in_order(counted, layers, partial(blank, num_experts, dtype=torch.int64))
    losses = _in_order(lost, layers, partial(blank, ()))
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    # The counts, and behind them what was told.
    summed = counts.view(-1) if told is None else torch.cat([counts.view(-1), told])
    if local:
        torch._foreach_zero_([*counted.values(), *lost.values()])
        # Every rank that has routed tokens of these layers: tensor (its parts of the sequence),
        # context and data parallel; expert parallelism divides the same ranks otherwise.
        group = next(iter(local.values())).tp_dp_cp_group
        dist.all_reduce(summed, group=group)
        dist.all_reduce(losses, group=group)
        if applied:
            moved_by = summed[: counts.numel()].view(counts.shape)
            here = [number in local for number in layers]
            # A list of numbers would be copied to the device, and waited for.
            of_local = moved_by if all(here) else torch.stack(list(compress(moved_by, here)))
            balance([local[number] for number in layers if number in local], of_local)
    elif told is not None:  # a stage without experts has ranks that were told something, too
        of_stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(summed, group=of_stage)
    moved = {number: router.expert_bias for number, router in local.items()}
    bias = _in_order(moved, layers, partial(blank, num_experts))
    if pipeline.size() > 1:
        for tensor in (summed, bias, losses):
            dist.all_reduce(tensor, group=pipeline)
    told = None if told is None else summed[counts.numel() :]
    counts = summed[: counts.numel()].view(counts.shape)
    return StepBalance(tuple(layers), counts, bias, losses, told)


def _in_order(
    of_local: Mapping[int, Tensor], layers: Sequence[int], blank: Callable[[], Tensor]
) -> Tensor:
    """The values of all layers; `blank` makes that of one on another pipeline stage."""
    missing = blank() if len(of_local) < len(layers) else None
    values: Any = [of_local.get(number, missing) for number in layers]
    return torch.stack(values)


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
    if args.verbose_log:
        print_rank_0(f"> experts of {int(number)} MoE layers: {balance_rule(args)}")
    return model


def balance_rule(args: Namespace) -> str:
    """In words, how the experts are balanced."""
    return {
        "sign": f"by the sign rule, step {args.moe_router_bias_update_rate:g}",
        "smebu": f"by SMEBU, kappa {args.smebu_kappa:g}, lambda {args.smebu_lambda:g}, "
        f"beta {args.smebu_beta:g}",
        "none": "not balanced: their expert bias stays as it is",
    }[args.load_balancing]
