"""What a rank's buffers of gradients and weights hold, and how much of them is padding."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_trinity.optimizer.layout import (
    OWN_BUFFERS,
    item_of,
    mark_parameters,
    parameter_layout,
    rows_in_shards,
)
from megatron_trinity.optimizer.param_groups import groups_from_args


@dataclass(frozen=True)
class Buffers:
    """Of one rank, over its chunks.

    Attributes:
        elements: with padding.
        parameters: of them, those that a parameter has.
        buckets: reduced and gathered one by one.
        matrices: parameters that Muon updates.
        cut: of them, those that the end of a shard cuts.
        cut_elements: elements of those.
    """

    elements: int
    parameters: int
    buckets: int
    matrices: int
    cut: int
    cut_elements: int

    @property
    def padding(self) -> float:
        """Share of the elements that nothing lies in."""
        return 1 - self.parameters / self.elements


def bucket_size(args: Namespace, stage: int, chunk: int, parameters: int) -> int | None:
    """Elements that Megatron asks of a bucket; None, without overlap and beyond the first chunk of
    the first stage, for one bucket a buffer.

    Args: parameters: of all chunks of the rank.
    """
    if not args.overlap_grad_reduce or stage > 0 or chunk > 0:
        return None
    if args.ddp_num_buckets:
        return int(parameters // args.ddp_num_buckets)
    of_stage = args.world_size // args.pipeline_model_parallel_size
    ranks = of_stage // args.tensor_model_parallel_size
    return args.ddp_bucket_size or max(40_000_000, 1_000_000 * ranks)


def bucket_sizes(args: Namespace, chunks: Sequence[Any], groups: Any) -> list[int | None]:
    """`bucket_size` of each chunk of a rank."""
    parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    stage = groups.pp.rank()
    return [bucket_size(args, stage, number, parameters) for number in range(len(chunks))]


def layouts_of_rank(args: Namespace, chunks: list[Any], groups: Any) -> list[Any]:
    """The `FullParamLayout` of each chunk on the meta device, as training makes it."""
    from megatron.training.training import get_megatron_ddp_config

    mark_parameters(groups_from_args(args), chunks)
    config = get_megatron_ddp_config(args)
    return [
        parameter_layout(
            list(chunk.parameters()),
            size,
            groups.intra_dp_cp.size(),
            config,
            groups.intra_expt_dp.size(),
        )
        for chunk, size in zip(chunks, bucket_sizes(args, chunks, groups), strict=True)
    ]


def buffers_of_rank(args: Namespace, chunks: list[Any], groups: Any) -> Buffers:
    """Of a rank with `--use-distributed-optimizer`, from its chunks on the meta device."""
    elements = parameters = buckets = 0
    matrices: list[int] = []
    cut: list[int] = []
    for layout in layouts_of_rank(args, chunks, groups):
        for of_buffer in layout.layouts.values():
            elements += of_buffer.bucket_indices[-1][1]
            parameters += sum(of_buffer.per_bucket_numel_unpadded)
            buckets += len(of_buffer.bucket_indices)
            for parameter, (start, _, number) in of_buffer.param_index_map.items():
                if not getattr(parameter, OWN_BUFFERS):
                    continue
                first, end = of_buffer.bucket_indices[number]
                shard = (end - first) // of_buffer.num_optimizer_shards
                matrices.append(parameter.numel())
                if len(rows_in_shards(start - first, item_of(parameter), shard)) > 1:
                    cut.append(parameter.numel())
    return Buffers(elements, parameters, buckets, len(matrices), len(cut), sum(cut))
