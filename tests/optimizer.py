"""The whole optimizer in ranks of any layout, with weights and gradients of the test's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AfmoeConfig

from tests.trinity import afmoe_config, build, parse

FLAGS = (
    *("--optimizer", "muon", "--lr", "2e-3", "--min-lr", "1e-4", "--adamw-lr", "1e-3"),
    *("--adamw-weight-decay", "0.02", "--weight-decay", "0.1", "--adam-beta2", "0.95"),
    *("--clip-grad", "0"),
)
ADAM_FLAGS = (
    *("--optimizer", "adam", "--lr", "1e-3", "--min-lr", "1e-4", "--weight-decay", "0.1"),
    *("--adam-beta2", "0.95", "--adam-eps", "1e-3", "--clip-grad", "0"),
)


def config() -> AfmoeConfig:
    """Matrices that are wide, tall and square; heads for TP 8, more than its query groups."""
    return afmoe_config(
        num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=8
    )


def canonical_shapes(rank: int, world_size: int) -> dict[str, tuple[int, ...]]:
    """Canonical name to shape of every trainable tensor; for one rank."""
    from megatron_trinity.model.shards import model_shards

    shards = model_shards(build(parse(config())))
    return {
        shard.key: shard.global_shape for shard in shards if not shard.key.endswith("expert_bias")
    }


def random_tensors(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Weights or gradients, the same for the same names, shapes and seed."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(*shapes[key], generator=generator) / 8 for key in sorted(shapes)}


@dataclass
class Part:
    """A rank's part of a tensor that a test puts together: where it starts, and what it has."""

    key: str
    start: tuple[int, ...]
    data: Tensor


def whole(shapes: Mapping[str, Sequence[int]], parts: Sequence[Part]) -> dict[str, Tensor]:
    """Put the parts of all ranks together; raises AssertionError where copies differ or miss."""
    tensors = {key: torch.full(tuple(shape), torch.nan) for key, shape in shapes.items()}
    for part in parts:
        place = tensors[part.key]
        leading = place.ndim - part.data.ndim
        for index in part.start[:leading]:
            place = place[index]
        for axis, (start, size) in enumerate(
            zip(part.start[leading:], part.data.shape, strict=True)
        ):
            place = place.narrow(axis, start, size)
        assert place.isnan().all() or torch.equal(place, part.data), f"{part.key}: copies differ"
        place.copy_(part.data)
    for key, tensor in tensors.items():
        assert not tensor.isnan().any(), f"{key} is not whole"
    return tensors


def build_optimizer(flags: Sequence[str], weights: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """A rank's model, with these weights, and its optimizer."""
    from megatron.training.training import get_megatron_optimizer_config

    from megatron_trinity.optimizer.optimizer import TrinityOptimizer
    from megatron_trinity.optimizer.param_groups import groups_from_args

    args = parse(config(), [*FLAGS, *flags])
    model = _build_model(args, weights)
    optimizer_config, _ = get_megatron_optimizer_config(args)
    optimizer_config.timers = None
    groups = groups_from_args(args)
    wrapped = wrap(args, model, groups) if args.use_layer_wise_distributed_optimizer else model
    optimizer = TrinityOptimizer(optimizer_config, [wrapped], groups)
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"]
    return model, optimizer


def wrap(args: Any, model: Any, groups: Any, **ddp: Any) -> Any:
    """A model in Megatron's DDP with the layout of Muon, as training has it."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_trinity.optimizer.layout import mark_parameters, parameter_layout
    from megatron_trinity.optimizer.ranks import data_parallel

    mark_parameters(groups, [model])
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
        **ddp,
    )
    sizes = [data_parallel(experts, sharded=True).size for experts in (False, True)]
    layout = parameter_layout(list(model.parameters()), None, sizes[0], config, sizes[1])
    return DistributedDataParallel(model.config, config, model, full_param_layout=layout)


def build_adam(flags: Sequence[str], weights: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """A rank's model, with these weights, and Megatron's Adam, as training makes it."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.training.training import get_megatron_optimizer_config

    from megatron_trinity.upstream.parameter_layout import set_parameter_layout

    set_parameter_layout(None)  # a run with Muon in these processes may have left its own
    args = parse(config(), [*ADAM_FLAGS, *flags])
    model = _build_model(args, weights)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=args.use_distributed_optimizer
    )
    wrapped = DistributedDataParallel(model.config, ddp, model)
    optimizer_config, overrides = get_megatron_optimizer_config(args)
    optimizer_config.timers = None
    optimizer = get_megatron_optimizer(
        optimizer_config, [wrapped], config_overrides=overrides, use_gloo_process_groups=False
    )
    for group in optimizer.param_groups:
        group["lr"] = args.lr
    return model, optimizer


def _build_model(args: Any, weights: Mapping[str, Tensor]) -> Any:
    from megatron.core.tensor_parallel import (
        set_defaults_if_not_set_tensor_model_parallel_attributes,
    )

    from megatron_trinity.model.shards import model_shards
    from tests.trinity import load_whole_tensors

    model = build(args)
    for parameter in model.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    biases = {s.key: torch.zeros(s.global_shape) for s in model_shards(model)}
    load_whole_tensors(model, {**biases, **weights})
    if args.bf16:
        from megatron.core.transformer.module import Float16Module

        model = Float16Module(model.config, model).module
    return model


def set_gradients(model: Any, gradients: Mapping[str, Tensor]) -> None:
    """Give every parameter of the rank its part of whole gradients, where Megatron has them."""
    from megatron_trinity.model.shards import local_row, parameter_parts

    for parameter, parts in parameter_parts(model):
        gradient = torch.zeros(parameter.shape)
        for part in parts:
            source = gradients[part.key]
            for index in part.global_offset[: part.prepend_axis_num]:
                source = source[index]
            for axis, size in enumerate(part.local_shape):
                source = source.narrow(axis, part.global_offset[part.prepend_axis_num + axis], size)
            row = local_row(part.data, parameter)
            gradient[row : row + part.local_shape[0]].copy_(source)
        if hasattr(parameter, "main_grad"):  # a place in the buffer of Megatron's Adam
            parameter.main_grad.copy_(gradient)
        else:
            setattr(parameter, "main_grad", gradient)


def held_weights(model: Any) -> list[Part]:
    """What this rank has of every trainable tensor."""
    from megatron_trinity.model.shards import model_shards

    return [
        Part(shard.key, shard.offset, shard.data.detach().float().clone())
        for shard in model_shards(model)
        if not shard.key.endswith("expert_bias")
    ]
