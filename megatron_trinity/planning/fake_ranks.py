"""Builds the model of any rank of a layout in one process, with no other ranks and no memory.

torch's fake process group stands for the other ranks, the meta device for memory. Groups, stages
and parameters come from megatron-core and the project's builder, as in training.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_trinity.errors import TrinityError, root_cause
from megatron_trinity.model.boxes import Box
from megatron_trinity.planning.sizes import LayerKind
from megatron_trinity.planning.stages import Chunk
from megatron_trinity.upstream import adapt_megatron

DEFAULT_FLAGS = ("--train-iters", "1000000")
"""What Megatron asks for and no layout depends on."""


@dataclass(frozen=True)
class BuiltRank:
    """What a rank holds.

    Attributes:
        stage: its pipeline rank.
        dense, expert: parameters outside and inside of routed experts.
        dense_ranks, expert_ranks: ranks that share the optimizer state of each kind.
        adamw: of `dense`, those that AdamW updates.
        unique: its parameters, each divided by the number of ranks that hold the same ones; over
            all ranks this sums to the number of parameters of the model.
        boxes: its part of every parameter.
    """

    rank: int
    stage: int
    chunks: tuple[Chunk, ...]
    dense: int
    expert: int
    dense_ranks: int
    expert_ranks: int
    adamw: int
    unique: Fraction
    boxes: tuple[Box, ...]


def parse_layout(preset: str, world_size: int, flags: Sequence[str]) -> Namespace:
    """Parsed and validated arguments of the trainer, as every one of `world_size` ranks has them.

    Raises:
        UsageError: the trainer would refuse them.
    """
    return parse_for_ranks(world_size, ["--preset", preset, *DEFAULT_FLAGS, *flags])


def parse_for_ranks(world_size: int, words: Sequence[str]) -> Namespace:
    """The same for a whole command line.

    Raises:
        UsageError: the trainer would refuse it.
    """
    from megatron_trinity.arguments.parse import parse_arguments
    from megatron_trinity.model.config import padded_vocab_size

    # Megatron prints every argument.
    with _environment(RANK="0", WORLD_SIZE=str(world_size)), _quiet():
        args = parse_arguments(words)
    args.padded_vocab_size = padded_vocab_size(args)
    return args


def stage_ranks(args: Namespace) -> list[list[int]]:
    """The ranks of each pipeline stage, ascending."""
    from megatron.core.parallel_state import RankGenerator

    model = args.tensor_model_parallel_size * args.context_parallel_size
    pipelines = RankGenerator(
        tp=args.tensor_model_parallel_size,
        ep=1,
        dp=args.world_size // (model * args.pipeline_model_parallel_size),
        pp=args.pipeline_model_parallel_size,
        cp=args.context_parallel_size,
        order=_order(args),
    ).get_ranks("pp")
    return [sorted(ranks) for ranks in zip(*pipelines, strict=True)]


def sample_ranks(args: Namespace, per_stage: int) -> list[int]:
    """Up to `per_stage` ranks of each stage, evenly spaced.

    The first and the last are among them, so with two or more a stage's first and last rank of
    tensor, expert and data parallelism are.
    """
    return [
        ranks[index]
        for ranks in stage_ranks(args)
        for index in np.unique(np.linspace(0, len(ranks) - 1, per_stage).round().astype(int))
    ]


def build_ranks(args: Namespace, ranks: Sequence[int], workers: int = 1) -> Iterator[BuiltRank]:
    """`build_rank` for each of `ranks`, in any order where more than one process works on them."""
    if workers == 1:
        yield from (build_rank(args, rank) for rank in ranks)
        return
    # Fresh processes: by now this one may have threads, which a fork does not survive.
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=adapt_megatron) as pool:
        yield from pool.imap_unordered(partial(build_rank, args), ranks, chunksize=4)


def build_rank(args: Namespace, rank: int) -> BuiltRank:
    """Build the model of `rank`, and say what it holds.

    To be called where no process group is open, after `adapt_megatron`.

    Raises:
        TrinityError: it does not build.
    """
    try:
        with fake_groups(args, rank) as groups:
            return _inspect(build_chunks(args, groups), groups, rank)
    except Exception as error:
        raise TrinityError(f"rank {rank} does not build: {root_cause(error)}") from error


@contextlib.contextmanager
def fake_groups(args: Namespace, rank: int) -> Iterator[Any]:
    """The process groups of `rank` in the layout of `args`: a `ProcessGroupCollection`."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=args.world_size)
    try:
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
            order=_order(args),
            create_gloo_process_groups=False,
        )
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build_chunks(args: Namespace, groups: Any) -> list[Any]:
    """This rank's `TrinityModel`s on the meta device, one a virtual stage."""
    from megatron_trinity.model.builder import TrinityModelBuilder
    from megatron_trinity.model.config import model_config_from_args

    config = model_config_from_args(args)
    # Else weights are made on the current GPU by name, where there is one, and not on meta.
    config.transformer.use_cpu_initialization = True
    builder = TrinityModelBuilder(config)
    virtual = args.virtual_pipeline_model_parallel_size
    with warnings.catch_warnings(), torch.device("meta"):
        # Megatron repeats for every expert that expert tensor parallelism of 1 needs none.
        warnings.filterwarnings("ignore", message="`sequence_parallel` is set to `True`")
        return [
            builder.build_model(groups, vp_stage=stage if virtual else None)
            for stage in range(virtual or 1)
        ]


def _inspect(models: list[Any], groups: Any, rank: int) -> BuiltRank:
    dense, expert, unique = 0, 0, Fraction(0)
    for model in models:
        for parameter in model.parameters():
            is_expert = not getattr(parameter, "allreduce", True)
            data, tensor = (
                (groups.expt_dp, groups.expt_tp) if is_expert else (groups.dp_cp, groups.tp)
            )
            is_split = getattr(parameter, "tensor_model_parallel", False)
            copies = data.size() * (1 if is_split else tensor.size())
            unique += Fraction(parameter.numel(), copies)
            dense += 0 if is_expert else parameter.numel()
            expert += parameter.numel() if is_expert else 0
    return BuiltRank(
        rank=rank,
        stage=groups.pp.rank(),
        chunks=tuple(_chunk(model) for model in models),
        dense=dense,
        expert=expert,
        dense_ranks=groups.intra_dp_cp.size(),
        expert_ranks=groups.intra_expt_dp.size(),
        adamw=sum(p.numel() for model in models for p in model.parameters() if _is_adamw(p)),
        unique=unique,
        boxes=tuple(box for model in models for box in _boxes(model)),
    )


def _chunk(model: Any) -> Chunk:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron_trinity.model.core_attention import layer_window

    layers = tuple(
        (
            layer.layer_number - 1,
            LayerKind(
                is_global=layer_window(layer.config, layer.layer_number) is None,
                is_moe=isinstance(layer.mlp, MoELayer),
            ),
        )
        for layer in model.decoder.layers
    )
    return Chunk(layers, has_embedding=model.pre_process, has_lm_head=model.post_process)


def _boxes(model: Any) -> Iterator[Box]:
    from megatron_trinity.model.shards import model_shards

    for shard in model_shards(model):
        if not shard.data.requires_grad:  # buffers: expert biases and their momentum
            continue
        shape = (1,) * shard.leading_axes + tuple(shard.data.shape)
        stop = tuple(start + size for start, size in zip(shard.offset, shape, strict=True))
        yield Box(shard.key, shard.offset, stop, shard.global_shape)


def _order(args: Namespace) -> str:
    return "tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp"


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    saved = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _quiet() -> contextlib.AbstractContextManager[Any]:
    return contextlib.redirect_stdout(io.StringIO())


def _is_adamw(parameter: torch.nn.Parameter) -> bool:
    """Whether AdamW updates it under Muon: embedding, output and gains."""
    return parameter.ndim == 1 or bool(
        getattr(parameter, "is_embedding_or_output_parameter", False)
    )
