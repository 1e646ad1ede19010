"""Nothing that is not finite goes into a checkpoint, or comes out of one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor


def nonfinite_value(model: Sequence[Any], optimizer: Any) -> str | None:
    """The first tensor over all ranks that holds such a value, or None; collective.

    Reads the weights, the state of the experts' balance and all that the optimizer keeps once.
    """
    own = next(_nonfinite(model, optimizer), None)
    everywhere: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return next(
        (f"{name} on rank {rank}" for rank, name in enumerate(everywhere) if name is not None), None
    )


def _nonfinite(model: Sequence[Any], optimizer: Any) -> Iterator[str]:
    named = [(name, t) for name, t in _tensors(model, optimizer) if t.is_floating_point()]
    named.sort(key=lambda entry: str(entry[1].dtype))
    for _, group in groupby(named, key=lambda entry: entry[1].dtype):
        of_dtype = [(name, tensor.detach()) for name, tensor in group if tensor.numel()]
        largest = torch._foreach_norm([tensor for _, tensor in of_dtype], math.inf)
        finite = torch.stack(list(largest)).isfinite().tolist()
        yield from (name for (name, _), is_ in zip(of_dtype, finite, strict=True) if not is_)


def _tensors(model: Sequence[Any], optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    for chunk in map(unwrap_model, model):
        yield from chunk.named_parameters()
        yield from chunk.named_buffers()
    for unit in getattr(optimizer, "units", ()):
        yield from ((f"{name} of {unit.name}", tensor) for name, tensor in unit.state.items())
    for inner in getattr(optimizer, "chained_optimizers", (optimizer,)):
        of_torch = getattr(inner, "optimizer", None)
        if of_torch is None:
            continue
        for group in of_torch.param_groups:
            yield from (("the optimizer's fp32 weights", p) for p in group["params"])
        for state in of_torch.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    yield f"the optimizer's {name}", value
