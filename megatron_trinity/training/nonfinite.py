"""Where a step first has a value that is not finite."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from torch import Tensor, nn

_EMBEDDING, _LAYER, _BEHIND = 0, 4, 1 << 30
"""Depths: a layer has some of its own for its parts."""
_LAYER_OF = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, order=True)
class Place:
    """The first of some places is the one that a step comes to first.

    Attributes:
        micro_batch: number of it on its rank, from 0.
        depth: how far from the embedding.
        rank: of the world.
        what: was not finite, in words.
        samples: first and last that the values come from, by their place in the run's order.
    """

    micro_batch: int
    depth: int
    rank: int
    what: str
    samples: tuple[int, int]


class ForwardTrace:
    """Looks at what every layer of this rank computes, until it is closed. One host sync each.

    Attributes:
        first: the first place that was not finite, or None so far.
    """

    def __init__(self, model: Sequence[nn.Module]) -> None:
        self.first: Place | None = None
        self._handles: list[Any] = []
        for chunk in map(unwrap_model, model):
            counter = _Counter()
            self._handles.append(chunk.register_forward_pre_hook(counter))
            for depth, what, module in parts(chunk):
                hook = partial(self._look, counter, depth, what)
                self._handles.append(module.register_forward_hook(hook))

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _look(self, counter: _Counter, depth: int, what: str, *call: Any) -> None:
        output = call[-1]
        values = output if isinstance(output, tuple) else (output,)
        # A recompute in the backward pass comes here again, when the first is long known.
        if self.first is None and not all(map(_is_finite, values)):
            samples = samples_of(counter.micro_batch)
            self.first = Place(counter.micro_batch, depth, dist.get_rank(), what, samples)


class _Counter:
    """Counts the micro-batches that a chunk of the model has begun."""

    micro_batch = -1

    def __call__(self, *_: Any) -> None:
        self.micro_batch += 1


def parts(chunk: Any) -> Iterator[tuple[int, str, nn.Module]]:
    """Depth, name and module of what a chunk of the model consists of, in forward order."""
    if chunk.pre_process:
        yield _EMBEDDING, "the output of the embedding", chunk.embedding
    for layer in chunk.decoder.layers:
        number = layer.layer_number
        yield number * _LAYER, f"the attention of layer {number}", layer.self_attention
        yield number * _LAYER + 1, f"the MLP of layer {number}", layer.mlp
        yield number * _LAYER + 2, f"the output of layer {number}", layer
    if chunk.post_process:
        yield _BEHIND, "the loss", chunk


def last_gradient(model: Sequence[nn.Module]) -> Place | None:
    """The gradient of this rank that the backward pass comes to first, of those not finite.

    Which micro-batch it comes from is not known any more: the samples are those of all.
    """
    found = [
        (*_depth(chunk, name), name)
        for chunk in map(unwrap_model, model)
        for name, parameter in chunk.named_parameters()
        if not _is_finite(getattr(parameter, "main_grad", None))
    ]
    if not found:
        return None
    depth, what, _ = max(found)
    return Place(0, -depth, dist.get_rank(), f"the gradient of {what}", samples_of(None))


def first_of_all(own: Place | None) -> Place | None:
    """The first place over all ranks, the same on each."""
    everywhere: list[Place | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return min((place for place in everywhere if place is not None), default=None)


def samples_of(micro_batch: int | None) -> tuple[int, int]:
    """First and last sample of a micro-batch of this rank, or of the step's global batch.

    Numbers count from 0 in the order in which the run takes its samples.
    """
    args = get_args()
    size, ranks = args.micro_batch_size, parallel_state.get_data_parallel_world_size()
    if micro_batch is None:
        first = args.consumed_train_samples
        return first, first + args.global_batch_size - 1
    before = micro_batch * ranks + parallel_state.get_data_parallel_rank()
    first = args.consumed_train_samples + before * size
    return first, first + size - 1


def _depth(chunk: Any, name: str) -> tuple[int, str]:
    """How far from the embedding a parameter stands, and its name with the number of its layer."""
    match = _LAYER_OF.fullmatch(name)
    if match is None:
        return (_EMBEDDING if name.startswith("embedding.") else _BEHIND), name
    number = chunk.decoder.layers[int(match[1])].layer_number
    return number * _LAYER, f"layer {number}'s {match[2]}"


def _is_finite(value: object) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    return bool(torch.isfinite(value.detach()).all())
