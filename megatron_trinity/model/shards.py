"""The parts of a model's tensors that this rank holds, under names that no layout changes.

A canonical name is the key that a tensor has in a `torch_dist` checkpoint, for example
`decoder.layers.5.mlp.experts.experts.linear_fc1.weight`, one tensor `[E, 2f, h]` for all experts.
Names and parts come from the model's own sharded state dict, so tensor, pipeline, virtual pipeline
and expert parallelism need no code here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_trinity.errors import TrinityError


@dataclass(frozen=True)
class Shard:
    """A rank's part of one canonical tensor.

    Attributes:
        key: canonical name.
        data: the part itself, a view of the parameter or buffer; no leading axes.
        global_shape: shape of the whole tensor.
        offset: where the part starts on every axis of the whole tensor.
        leading_axes: how many axes of the whole tensor stand in front of `data`'s (1 for experts).
    """

    key: str
    data: Tensor
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    leading_axes: int

    @property
    def index(self) -> tuple[int, ...]:
        """Where the part stands on the leading axes: the number of an expert."""
        return self.offset[: self.leading_axes]

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor behind its leading axes."""
        return self.global_shape[self.leading_axes :]

    def of(self, whole: Tensor) -> Tensor:
        """The view of `whole`, a tensor of `matrix_shape`, that this part covers."""
        for axis, size in enumerate(self.data.shape):
            whole = whole.narrow(axis, self.offset[self.leading_axes + axis], size)
        return whole


def parameter_parts(model: MegatronModule) -> Iterator[tuple[nn.Parameter, list[ShardedTensor]]]:
    """Every trainable parameter of `model`, with the parts of canonical tensors that it holds.

    The data of a part is a view of the parameter: of all of it, or of its gate or up rows.

    Raises:
        TrinityError: a parameter is not in the model's sharded state dict.
    """
    entries = {id(entry.data): entry for entry in _entries(model.sharded_state_dict())}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) not in entries:
            raise TrinityError(f"{name} has no place in the model's sharded state dict")
        # Views that autograd knew would tie the model to its own hooks, and it would never go.
        yield (
            parameter,
            [
                replace(part, data=part.data.detach())
                for part in _sharded_tensors(entries[id(parameter)])
            ],
        )


def local_row(view: Tensor, parameter: Tensor) -> int:
    """The row of `parameter` with which `view`, whole rows of it, begins."""
    return int((view.storage_offset() - parameter.storage_offset()) // parameter.stride(0))


@dataclass(frozen=True)
class HeldPart:
    """Rows of a tensor of a rank that are a box of a canonical tensor.

    Attributes:
        key: canonical name.
        offset: where the box starts on every axis of the canonical tensor.
        shape: of the box, without its leading axes.
        row, rows: where it stands in the rank's tensor.
    """

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    row: int
    rows: int


@dataclass(frozen=True)
class Held:
    """A parameter or buffer of a rank, and what it is made of.

    Attributes:
        shape: of the rank's tensor.
    """

    shape: tuple[int, ...]
    parts: tuple[HeldPart, ...]


def held_tensors(model: MegatronModule, metadata: Mapping[str, Any]) -> dict[str, Held]:
    """Name in the model's state dict to what each parameter and buffer of this rank is made of.

    Args:
        metadata: that a checkpoint is written with, which says which buffers it has.
    """
    entries = {
        id(entry.data): entry for entry in _entries(model.sharded_state_dict(metadata={**metadata}))
    }
    return {
        name: Held(
            tuple(tensor.shape),
            tuple(
                HeldPart(
                    part.key,
                    tuple(part.global_offset),
                    tuple(part.local_shape),
                    local_row(part.data, tensor),
                    part.local_shape[0],
                )
                for part in _sharded_tensors(entries[id(tensor)])
            ),
        )
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if id(tensor) in entries
    }


def model_shards(model: MegatronModule) -> Iterator[Shard]:
    """Every part of every tensor (parameters and persistent buffers) that `model` holds."""
    for tensor in _sharded_tensors(model.sharded_state_dict()):
        yield Shard(
            tensor.key,
            tensor.data,
            tuple(tensor.global_shape),
            tuple(tensor.global_offset),
            tensor.prepend_axis_num,
        )


def whole_tensors(model: MegatronModule) -> dict[str, Tensor]:
    """Canonical name to a copy of the whole tensor, for a model that lies on one rank."""
    tensors: dict[str, Tensor] = {}
    for shard in model_shards(model):
        if shard.key not in tensors:
            tensors[shard.key] = torch.empty(shard.global_shape, dtype=shard.data.dtype)
        shard.of(tensors[shard.key][shard.index]).copy_(shard.data.detach())
    return tensors


def _sharded_tensors(state: object) -> Iterator[ShardedTensor]:
    for entry in _entries(state):
        # Gate and up are one tensor on a rank; the factory gives views of the two halves.
        yield from _entries(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]


def _entries(state: object) -> Iterator[Any]:
    """Sharded tensors, and factories of them, in a nested state dict."""
    if isinstance(state, ShardedTensor | ShardedTensorFactory):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _entries(value)
    elif isinstance(state, list):
        for value in state:
            yield from _entries(value)
