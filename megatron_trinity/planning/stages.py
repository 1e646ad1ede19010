"""Which layers each pipeline stage holds, from arguments alone."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    from megatron_trinity.model.layer_specs import stage_layers

    sizes = ModelSizes.from_args(args)
    stages = args.pipeline_model_parallel_size
    virtual = args.virtual_pipeline_model_parallel_size or 1
    config: Any = Namespace(
        num_layers=args.num_layers,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_layout=_layout(args),
        num_layers_in_first_pipeline_stage=args.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=args.decoder_last_pipeline_num_layers,
        account_for_embedding_in_pipeline_split=args.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=args.account_for_loss_in_pipeline_split,
    )

    def chunk(stage: int, number: int) -> Chunk:
        vp_stage = number if args.virtual_pipeline_model_parallel_size else None
        return Chunk(
            tuple((n, sizes.layer_kind(n)) for n in stage_layers(config, vp_stage, stage)),
            has_embedding=stage == number == 0,
            has_lm_head=stage == stages - 1 and number == virtual - 1,
        )

    return [tuple(chunk(stage, number) for number in range(virtual)) for stage in range(stages)]


def unlike_stages(stages: Sequence[tuple[Chunk, ...]]) -> list[tuple[int, tuple[Chunk, ...]]]:
    """The first of those that hold the same kinds of layers, which has most in flight."""
    found: dict[object, tuple[int, tuple[Chunk, ...]]] = {}
    for number, chunks in enumerate(stages):
        key = tuple((sorted(map(str, c.kinds)), c.has_embedding, c.has_lm_head) for c in chunks)
        found.setdefault(str(key), (number, chunks))
    return list(found.values())


def _layout(args: Namespace) -> Any:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    layout = args.pipeline_model_parallel_layout
    if layout is None or isinstance(layout, PipelineParallelLayerLayout):
        return layout
    return PipelineParallelLayerLayout(layout, args.pipeline_model_parallel_size)
