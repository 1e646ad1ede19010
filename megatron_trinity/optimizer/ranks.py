"""The ranks that hold the same parameters, and those that hold parts of the same matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from megatron_trinity.optimizer.muon import Held, gathered


@dataclass(frozen=True)
class DataParallel:
    """The ranks that hold the same parameters, as the optimizer sees them.

    Attributes:
        group: the ranks that share the work of an optimizer instance.
        size, rank: of that group.
        instance: number of this rank's instance.
        tensor: the tensor-parallel group of the same parameters.
    """

    group: ProcessGroup
    size: int
    rank: int
    instance: int
    tensor: ProcessGroup


def data_parallel(experts: bool, sharded: bool) -> DataParallel:
    """The groups of the experts' parameters, or of all others.

    Args:
        sharded: whether several optimizer instances may stand beside each other.
    """
    if experts:
        group = parallel_state.get_expert_data_parallel_group(partial_expert_data_parallel=sharded)
        whole = parallel_state.get_expert_data_parallel_group()
        tensor = parallel_state.get_expert_tensor_parallel_group()
    else:
        group = parallel_state.get_data_parallel_group(
            with_context_parallel=True, partial_data_parallel=sharded
        )
        whole = parallel_state.get_data_parallel_group(with_context_parallel=True)
        tensor = parallel_state.get_tensor_model_parallel_group()
    return DataParallel(group, group.size(), group.rank(), whole.rank() // group.size(), tensor)


def matrix_group(ranks: DataParallel) -> ProcessGroup:
    """The ranks over which a matrix may be spread: tensor-parallel ones times data-parallel ones.

    Collective over all ranks where it has to be made.
    """
    if ranks.tensor.size() == 1:
        return ranks.group
    if ranks.size == 1:
        return ranks.tensor
    rows = gathered(dist.get_process_group_ranks(ranks.group), ranks.tensor)
    own = tuple(sorted(rank for row in rows for rank in row))
    everywhere: list[tuple[int, ...]] = [own] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    groups = {members: dist.new_group(list(members)) for members in sorted(set(everywhere))}
    return groups[own]


def held_by_ranks(
    ranks: DataParallel, by_rank: Sequence[Sequence[Held]], group: ProcessGroup
) -> list[Sequence[Held]]:
    """What each rank of a `matrix_group` holds, in its order.

    Nobody is asked but tensor-parallel ranks.

    Args: by_rank: what each data-parallel rank holds, which this one knows from the layout.
    """
    own = dict(zip(dist.get_process_group_ranks(ranks.group), by_rank, strict=True))
    held: dict[int, Sequence[Held]] = {}
    for of_rank in gathered(own, ranks.tensor):
        held.update(of_rank)
    return [held[rank] for rank in dist.get_process_group_ranks(group)]
