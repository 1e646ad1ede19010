"""Where parameters lie in Megatron's buffers, so that each rank's shard of a bucket suits Muon.

A bucket is reduced and gathered in equal shards, one a data-parallel rank. If whole parameters can
be dealt out evenly they lie whole: each shard's rank has all that an update needs. If they cannot
(few matrices, many ranks) shards are filled one after the other, and what crosses the end of a
shard is cut there, between two rows; the optimizer brings the parts of such a matrix together.
Either way next to nothing of a bucket is padding.

Here are no processes and no tensors' values: the same parameters give the same layout on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed.param_and_grad_buffer import group_params_for_buffers
from megatron.core.optimizer.param_layout import (
    FullParamLayout,
    PerBufferParamLayout,
    bucket_end_divisor,
)
from megatron.core.transformer.module import MegatronModule
from torch import nn

from megatron_trinity.model.shards import parameter_parts
from megatron_trinity.optimizer.param_groups import Group, group_of

ALIGNMENT = 64
"""Elements that a parameter, and a shard, starts at a multiple of, as Megatron has it."""
OWN_BUFFERS = "is_managed_by_layer_wise_optimizer"
"""Attribute of a parameter that keeps it apart from those without, in Megatron's buffers."""
MANY_ROWS = 32
"""A shard of a bucket has so many times what its size is a multiple of, so that little is padding,
whatever size of bucket is asked for."""
SLACK = 0.01
"""Padding that whole parameters are worth; above it some are cut."""


@dataclass(frozen=True)
class Item:
    """What a layout has to know of a parameter.

    Attributes:
        numel: its elements.
        width: elements of a row; 1 of a vector.
    """

    numel: int
    width: int

    @property
    def alignment(self) -> int:
        """What its start is a multiple of, so that the end of a shard is that of a row."""
        return math.lcm(self.width, ALIGNMENT)


@dataclass(frozen=True)
class Bucket:
    """Items that are reduced and gathered together.

    Attributes:
        starts: of each item, from the start of the bucket.
        shard: elements of each rank's part.
    """

    starts: tuple[int, ...]
    shard: int


def mark_parameters(groups: Sequence[Group], chunks: list[MegatronModule]) -> list[MegatronModule]:
    """Tell Megatron's buffers which parameters Muon updates; returns the chunks.

    Raises:
        TrinityError: a parameter is in no group or in two.
    """
    muon = {group.name for group in groups if group.kind == "muon"}
    for chunk in chunks:
        for parameter, parts in parameter_parts(chunk):
            setattr(parameter, OWN_BUFFERS, group_of(parts[0].key) in muon)
    return chunks


def place(items: Sequence[Item], ranks: int, divisor: int = ALIGNMENT) -> Bucket:
    """Give every item its place in one bucket.

    Args:
        ranks: number of shards.
        divisor: of the size of a shard.
    """
    total = sum(item.numel for item in items)
    whole = _place_whole(items, ranks, divisor)
    if ranks == 1 or whole.shard * ranks <= (1 + SLACK) * total:
        return whole
    cut = _place_cut(items, ranks, math.lcm(divisor, *(item.width for item in items)))
    return min(whole, cut, key=lambda bucket: bucket.shard)


def _place_whole(items: Sequence[Item], ranks: int, divisor: int) -> Bucket:
    """The largest first, always into the shard with the least so far."""
    fill = [0] * ranks
    places = [(0, 0)] * len(items)
    for number in sorted(range(len(items)), key=lambda n: (-items[n].numel, n)):
        shard = min(range(ranks), key=lambda rank: (fill[rank], rank))
        start = _up(fill[shard], ALIGNMENT)
        places[number] = (shard, start)
        fill[shard] = start + items[number].numel
    size = _up(max(fill), divisor)
    return Bucket(tuple(shard * size + start for shard, start in places), size)


def _place_cut(items: Sequence[Item], ranks: int, divisor: int) -> Bucket:
    """One after the other; into each shard the largest that fit, and one that goes on in the next.

    Args:
        divisor: a multiple of every item's width, so that shards end with a row.
    """
    size = _up(-(-sum(item.numel for item in items) // ranks), divisor)
    while True:
        starts, end = _in_a_row(items, size)
        if end <= ranks * size:
            return Bucket(starts, size)
        size = _up(-(-end // ranks), divisor)


def _in_a_row(items: Sequence[Item], size: int) -> tuple[tuple[int, ...], int]:
    """Starts in shards of `size`, and where the last one ends."""
    left = sorted(range(len(items)), key=lambda number: (-items[number].numel, number))
    starts = [0] * len(items)
    end = 0
    while left:
        room = size - end % size
        fitting = (n for n in left if _up(end, items[n].alignment) - end + items[n].numel <= room)
        number = next(fitting, left[-1])
        left.remove(number)
        starts[number] = _up(end, items[number].alignment)
        end = starts[number] + items[number].numel
    return tuple(starts), end


def buckets(items: Sequence[Item], bucket_size: int | None, least: int = 0) -> list[range]:
    """Runs of items with at least `bucket_size` elements each, or `least` if that is more.

    Only the last may have fewer than `bucket_size`, and only one that is alone fewer than `least`.
    `bucket_size` None is for one run.
    """
    if bucket_size is None:
        return [range(len(items))]
    runs, first, filled = [], 0, 0
    for number, item in enumerate(items):
        filled += item.numel
        if filled >= max(bucket_size, least):
            runs.append(range(first, number + 1))
            first, filled = number + 1, 0
    if first < len(items):
        if runs and filled < least:
            first = runs.pop().start
        runs.append(range(first, len(items)))
    return runs


def rows_in_shards(start: int, item: Item, shard: int) -> list[tuple[int, tuple[int, int]]]:
    """The ranks that hold rows of an item, and which, `[first, last)`.

    Args: start: of the item in its bucket.
    """
    found, row, rows = [], 0, item.numel // item.width
    while row < rows:
        rank = (start + row * item.width) // shard
        stop = min(rows, ((rank + 1) * shard - start) // item.width)
        found.append((rank, (row, stop)))
        row = stop
    return found


def parameter_layout(
    parameters: Sequence[nn.Parameter],
    bucket_size: int | None,
    ranks: int,
    ddp_config: Any,
    expert_data_parallel_world_size: int,
) -> FullParamLayout:
    """The layout of a model chunk's parameters, in the form that Megatron's buffers take.

    What Muon updates has buffers of its own (`mark_parameters`), so that its work is shared by all
    ranks, whatever is cut of embedding and output.

    Args:
        parameters: in the order of the model.
        bucket_size: elements of a bucket, or more; None for one bucket a buffer.
        ranks, expert_data_parallel_world_size: shards of a bucket, of experts and of all others.
        ddp_config: Megatron's `DistributedDataParallelConfig`.
    """
    groups = group_params_for_buffers(list(parameters), ddp_config.grad_reduce_in_fp32)
    layouts = {}
    for key, (held, indices) in groups.items():
        shards = expert_data_parallel_world_size if key.is_expert_parallel else ranks
        of_bucket = bucket_end_divisor(shards, ddp_config.pad_buckets_for_high_nccl_busbw)
        divisor = math.lcm(ALIGNMENT, of_bucket // shards)
        layouts[key] = _layout_of_buffer(held, indices, bucket_size, shards, divisor)
    return FullParamLayout(layouts=layouts)


def _layout_of_buffer(
    parameters: Sequence[nn.Parameter],
    indices: list[int],
    bucket_size: int | None,
    ranks: int,
    divisor: int,
) -> PerBufferParamLayout:
    held = list(reversed(parameters))  # the last ones have their gradients first
    items = [item_of(parameter) for parameter in held]
    layout = PerBufferParamLayout(param_indices=indices, num_optimizer_shards=ranks)
    offset = 0
    least = MANY_ROWS * ranks * math.lcm(divisor, *(item.width for item in items))
    for number, run in enumerate(buckets(items, bucket_size, least)):
        bucket = place([items[index] for index in run], ranks, divisor)
        for index, start in zip(run, bucket.starts, strict=True):
            first = offset + start
            layout.param_index_map[held[index]] = (first, first + items[index].numel, number)
        end = offset + ranks * bucket.shard
        layout.bucket_indices.append((offset, end))
        layout.per_bucket_numel_unpadded.append(sum(items[index].numel for index in run))
        offset = end
    return layout


def item_of(parameter: nn.Parameter) -> Item:
    """What a layout has to know of a parameter, a matrix or a vector."""
    return Item(parameter.numel(), parameter[0].numel() if parameter.ndim > 1 else 1)


def _up(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor
