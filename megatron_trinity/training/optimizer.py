"""How the trainer gets its optimizer."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.utils import print_rank_0

from megatron_trinity.optimizer.layout import mark_parameters, parameter_layout
from megatron_trinity.optimizer.optimizer import TrinityOptimizer
from megatron_trinity.optimizer.param_groups import groups_from_args, summary
from megatron_trinity.optimizer.units import Unit
from megatron_trinity.upstream.optimizer_factory import set_optimizer_factory, set_schedule_start
from megatron_trinity.upstream.parameter_layout import set_parameter_layout


def set_up_optimizer(args: Namespace) -> None:
    """Let Megatron's setup make the optimizer and the schedule that `args` ask for."""
    is_muon = args.optimizer == "muon"
    set_optimizer_factory(partial(build_optimizer, args) if is_muon else None)
    set_parameter_layout(parameter_layout if is_muon else None)
    set_schedule_start(args.lr_restart_samples)


def container_from_args(args: Namespace, model_config: Any) -> Any:
    """Megatron's configuration of a run."""
    container = pretrain_cfg_container_from_args(args, model_config)
    if args.use_layer_wise_distributed_optimizer:  # so Megatron calls sharding under muon
        container.ddp.use_distributed_optimizer = True
        marked = partial(mark_parameters, groups_from_args(args))
        container.model.pre_wrap_hooks.append(marked)
    return container


def build_optimizer(
    args: Namespace, config: OptimizerConfig, model: Sequence[Any]
) -> TrinityOptimizer:
    """The optimizer of this rank's model chunks; says on rank 0 who updates what."""
    groups = groups_from_args(args)
    optimizer = TrinityOptimizer(config, model, groups)
    for line in summary(groups, _shapes_of_model(optimizer.units)):
        print_rank_0(line)
    return optimizer


def _shapes_of_model(units: Iterable[Unit]) -> dict[str, list[tuple[int, ...]]]:
    """Group to the shapes of its matrices or tensors, over all pipeline stages and experts."""
    own: dict[str, dict[str, tuple[int, ...]]] = {}
    for unit in units:
        shapes = own.setdefault(unit.group.name, {})
        part = unit.parts[0]
        if not unit.pieces:
            shapes[part.key] = tuple(part.global_shape)
        # A rank has some of the experts; the canonical tensor says how many there are.
        experts = range(part.global_shape[0]) if part.prepend_axis_num else [0]
        for piece in unit.pieces:
            for expert in experts:
                shapes[f"{piece.tensor} {piece.part} {expert}"] = piece.shape
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[Any] = [None] * group.size()
    dist.all_gather_object(stages, own, group=group)
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for stage in stages:
        for name, shapes in stage.items():
            found.setdefault(name, {}).update(shapes)
    return {name: list(shapes.values()) for name, shapes in found.items()}
