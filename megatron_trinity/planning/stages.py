"""Which layers each pipeline stage holds, from arguments alone."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_trinity.planning.sizes import LayerKind, ModelSizes


@dataclass(frozen=True)
class Chunk:
    """A pipeline stage, or one virtual stage of it.

    Attributes:
        layers: 0-based number of each decoder layer, and what it is.
    """

    layers: tuple[tuple[int, LayerKind], ...]
    has_embedding: bool
    has_lm_head: bool

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        return tuple(kind for _, kind in self.layers)


def stage_chunks(args: Namespace) -> list[tuple[Chunk, ...]]:
    """The chunks of each pipeline stage, as Megatron lays them out for parsed arguments."""
    sizes = ModelSizes.from_args(args)
    stages = args.pipeline_model_parallel_size
    virtual = args.virtual_pipeline_model_parallel_size or 1
    counts = _layers_of_chunks(args, stages, virtual)
    first = [sum(counts[:number]) for number in range(len(counts))]

    def chunk(stage: int, number: int) -> Chunk:
        place = number * stages + stage  # all first chunks, then all second ones, ...
        numbers = range(first[place], first[place] + counts[place])
        return Chunk(
            tuple((n, sizes.layer_kind(n)) for n in numbers),
            has_embedding=place == 0,
            has_lm_head=place == len(counts) - 1,
        )

    return [tuple(chunk(stage, number) for number in range(virtual)) for stage in range(stages)]


def _layers_of_chunks(args: Namespace, stages: int, virtual: int) -> list[int]:
    """How many decoder layers each chunk has, in the order of the model.

    Megatron's functions for it ask process groups, which a plan has none of.
    """
    layout = args.pipeline_model_parallel_layout
    if layout is not None:
        from megatron.core.transformer.enums import LayerType
        from megatron.core.transformer.pipeline_parallel_layer_layout import (
            PipelineParallelLayerLayout,
        )

        if not isinstance(layout, PipelineParallelLayerLayout):
            layout = PipelineParallelLayerLayout(layout, stages)
        rows = [
            layout.layout[stage][number] for number in range(virtual) for stage in range(stages)
        ]
        return [row.count(LayerType.decoder) for row in rows]
    ends = (args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers)
    embedding = bool(args.account_for_embedding_in_pipeline_split)
    loss = bool(args.account_for_loss_in_pipeline_split)
    left = args.num_layers + embedding + loss - sum(end or 0 for end in ends)
    even = left // max(stages - sum(end is not None for end in ends), 1)
    per_stage = [even] * stages
    for place, end in zip((0, -1), ends, strict=True):
        if end is not None:
            per_stage[place] = end
    counts = [number // virtual for number in per_stage] * virtual
    counts[0] -= embedding
    counts[-1] -= loss
    return counts


def unlike_stages(stages: Sequence[tuple[Chunk, ...]]) -> list[tuple[int, tuple[Chunk, ...]]]:
    """The first of those that hold the same kinds of layers, which has most in flight."""
    found: dict[object, tuple[int, tuple[Chunk, ...]]] = {}
    for number, chunks in enumerate(stages):
        key = tuple((sorted(map(str, c.kinds)), c.has_embedding, c.has_lm_head) for c in chunks)
        found.setdefault(str(key), (number, chunks))
    return list(found.values())
