"""Bytes of weights, gradients and optimizer state of any rank, from arguments alone.

They follow from the buffers that Megatron makes of a rank's parameters, padding included, which are
laid out here by the functions that lay them out in training.
"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_trinity.optimizer.layout import parameter_layout
from megatron_trinity.planning.buffers import bucket_size
from megatron_trinity.planning.rank_parameters import (
    RankParameter,
    chunk_parameters,
    counted_parameters,
    meta_parameters,
    model_dtype,
    optimizer_kinds,
)
from megatron_trinity.planning.stages import Chunk

FP32 = 4
MOMENTS = {"muon": 1, "adamw": 2}
ROUNDED = ("attention", "dense", "experts")
"""Optimizer groups whose products may be in FP8."""
BLOCK_SCALE_BYTES = {"blockwise": FP32 / 128**2, "mxfp8": 1 / 32}
STEP = 4
"""Of each tensor that AdamW updates torch keeps the number of steps, in fp32."""


@dataclass(frozen=True)
class StateBytes:
    """Of one rank.

    Attributes:
        weights: in the model's dtype, with the padding of buffers.
        gradients: sums over micro-batches, likewise.
        optimizer: fp32 weights that are not the model's own, and moments.
        padding: of weights and gradients, what no parameter has.
    """

    weights: int
    gradients: int
    optimizer: int
    padding: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class DataRanks:
    """How many ranks share buffers.

    Attributes:
        dense, experts: shards of a bucket, of routed experts and of all else.
    """

    dense: int
    experts: int


def data_ranks(args: Namespace) -> DataRanks:
    """Of an instance of the optimizer; each rank is its own where state is not shared."""
    instances = args.num_distributed_optimizer_instances
    of_stage = args.world_size // args.pipeline_model_parallel_size
    experts = args.expert_tensor_parallel_size * args.expert_model_parallel_size
    return DataRanks(
        of_stage // args.tensor_model_parallel_size // instances, of_stage // experts // instances
    )


def is_sharded(args: Namespace) -> bool:
    """Whether data-parallel ranks share optimizer state."""
    return bool(args.use_distributed_optimizer or args.use_layer_wise_distributed_optimizer)


def copies_in_fp8(args: Namespace, parameters: Counter[RankParameter]) -> int:
    """Bytes of what Transformer Engine's layers keep of their weights between micro-batches: one
    copy for each way in which a product reads it."""
    if not args.fp8:
        return 0
    rounded = [number * p.numel for p, number in parameters.items() if p.group in ROUNDED]
    scales = BLOCK_SCALE_BYTES.get(args.fp8_recipe, 0)
    return int(2 * sum(rounded) * (1 + scales))


@dataclass(frozen=True)
class StageState:
    """What the ranks of a pipeline stage hold: the same parameters, other shards of state."""

    args: Namespace
    stage: int
    chunks: Sequence[Chunk]

    @cached_property
    def parameters(self) -> list[list[RankParameter]]:
        """Of each chunk, in order."""
        return [chunk_parameters(self.args, chunk) for chunk in self.chunks]

    @cached_property
    def counted(self) -> Counter[RankParameter]:
        """How many there are of each."""
        return sum((counted_parameters(self.args, c) for c in self.chunks), Counter())

    @cached_property
    def numel(self) -> int:
        """Parameters of a rank."""
        return sum(number * parameter.numel for parameter, number in self.counted.items())

    def of_rank(self, dense: int, experts: int) -> StateBytes:
        """Args: dense, experts: number of the rank in the groups of `data_ranks`."""
        weights = gradients = padding = 0
        for key, layout in self.buffers:
            used, size = sum(layout.per_bucket_numel_unpadded), layout.bucket_indices[-1][1]
            each = key.param_dtype.itemsize + key.grad_dtype.itemsize
            weights += size * key.param_dtype.itemsize
            gradients += size * key.grad_dtype.itemsize
            padding += (size - used) * each
        state = sum(
            self._of_buffer(key, layout, experts if key.is_expert_parallel else dense)
            for key, layout in self.buffers
        )
        return StateBytes(weights, gradients, state, padding)

    def about(self) -> StateBytes:
        """Of a rank, were there no padding and equal shards: quickly, to compare layouts."""
        kinds, ranks = optimizer_kinds(self.args), data_ranks(self.args)
        dtype = model_dtype(self.args).itemsize
        weights = gradients = state = 0
        for parameter, number in self.counted.items():
            numel = number * parameter.numel
            each = FP32 if parameter.group == "gains" else dtype
            weights += each * numel
            summed = FP32 if self.args.accumulate_allreduce_grads_in_fp32 else each
            gradients += summed * numel
            moments = MOMENTS[kinds[parameter.group]] if self.args.optimizer == "muon" else 2
            shards = ranks.experts if parameter.routed else ranks.dense
            of_state = FP32 * (moments + (each != FP32)) * numel
            state += of_state // (shards if is_sharded(self.args) else 1)
        return StateBytes(weights, gradients, state, 0)

    def fullest(self) -> StateBytes:
        """Of the rank with most."""
        return max((self.of_rank(*rank) for rank in self.ranks()), key=lambda state: state.total)

    def ranks(self) -> Iterator[tuple[int, int]]:
        """Numbers of ranks in both groups, of all that differ."""
        args, ranks = self.args, data_ranks(self.args)
        if not is_sharded(args):
            yield 0, 0
            return
        of_stage = args.world_size // args.pipeline_model_parallel_size
        experts = args.expert_tensor_parallel_size * args.expert_model_parallel_size
        numbers = {
            (r // args.tensor_model_parallel_size % ranks.dense, r // experts % ranks.experts)
            for r in range(of_stage)
        }
        yield from sorted(numbers)

    @cached_property
    def buffers(self) -> list[tuple[Any, Any]]:
        """Megatron's key and layout of each buffer of each chunk."""
        return [
            entry
            for number, chunk in enumerate(self.parameters)
            for entry in self._layouts(number, chunk).items()
        ]

    def _layouts(self, number: int, chunk: list[RankParameter]) -> dict[Any, Any]:
        from megatron.core.distributed.param_and_grad_buffer import (
            _compute_default_per_buffer_param_layout,
            group_params_for_buffers,
        )
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        args, parameters = self.args, meta_parameters(self.args, chunk)
        fp32 = args.accumulate_allreduce_grads_in_fp32
        size = bucket_size(args, self.stage, number, self.numel)
        if not is_sharded(args):
            return {
                key: _compute_default_per_buffer_param_layout(held, size)
                for key, (held, _) in group_params_for_buffers(parameters, fp32).items()
            }
        ranks = data_ranks(args)
        config: Any = Namespace(
            grad_reduce_in_fp32=fp32,
            pad_buckets_for_high_nccl_busbw=args.ddp_pad_buckets_for_high_nccl_busbw,
        )
        make: Any = DistributedOptimizer.compute_full_param_layout
        if args.optimizer == "muon":
            make = parameter_layout
        layouts: dict[Any, Any] = make(parameters, size, ranks.dense, config, ranks.experts).layouts
        return layouts

    def _of_buffer(self, key: Any, layout: Any, rank: int) -> int:
        """Optimizer state of a rank's shards of a buffer, or of all of it."""
        kind = "muon" if key.is_managed_by_layer_wise_optimizer else "adamw"
        own_copy = key.param_dtype.itemsize != FP32
        each = FP32 * (own_copy + MOMENTS[kind])
        step = STEP if kind == "adamw" else 0
        if not is_sharded(self.args):
            places = layout.param_index_map.values()
            return sum((end - start) * each + step for start, end, _ in places)
        state = 0
        for number, (first, end) in enumerate(layout.bucket_indices):
            shard = (end - first) // layout.num_optimizer_shards
            low = first + rank * shard
            held = [
                min(stop, low + shard) - max(start, low)
                for start, stop, bucket in layout.param_index_map.values()
                if bucket == number and start < low + shard and stop > low
            ]
            # Ours is of the whole shard, Megatron's of each parameter by itself.
            size = shard if self.args.optimizer == "muon" and held else sum(held)
            state += size * each + len(held) * step
        return state
