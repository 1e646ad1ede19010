"""Gathers and reduce-scatters of unequal parts over gloo."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="cpu-uneven-collectives",
    symbols=(
        "megatron.core.tensor_parallel.mappings._gather_along_first_dim",
        "megatron.core.tensor_parallel.mappings._reduce_scatter_along_first_dim",
    ),
    reason=(
        "with expert and expert-tensor parallelism together, ranks of an expert-tensor group "
        "hold different numbers of tokens; `all_gather` and `reduce_scatter` take those over "
        "NCCL, not over gloo"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="gloo takes unequal parts",
    when="without_cuda",
    after=("cpu-jit",),
)


def gather_uneven(part: Tensor, sizes: Sequence[int], group: Any) -> Tensor:
    """Concatenate the parts of all ranks by rows; rank i's has `sizes[i]` of them."""
    padded = part.new_zeros(max(sizes), *part.shape[1:])
    padded[: part.shape[0]] = part
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([whole[:size] for whole, size in zip(gathered, sizes, strict=True)])


def reduce_scatter_uneven(whole: Tensor, sizes: Sequence[int], group: Any) -> Tensor:
    """Sum `whole` over ranks and return this rank's rows; rank i gets `sizes[i]` of them."""
    total = whole.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.split(list(sizes))[group.rank()].clone()


def _uneven(
    original: Callable[..., Tensor], instead: Callable[[Tensor, Sequence[int], Any], Tensor]
) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def wrapped(
        tensor: Tensor, group: Any, sizes: Sequence[int] | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if sizes is None or len(set(sizes)) == 1 or group.size() == 1:
            return original(tensor, group, sizes, *args, **kwargs)
        return instead(tensor, sizes, group)

    return wrapped


def install() -> None:
    """Replace the two functions that every region with unequal parts goes through."""
    from megatron.core.tensor_parallel import mappings

    mappings._gather_along_first_dim = _uneven(mappings._gather_along_first_dim, gather_uneven)
    mappings._reduce_scatter_along_first_dim = _uneven(
        mappings._reduce_scatter_along_first_dim, reduce_scatter_uneven
    )
