"""What is checked of a layout when its ranks are built, and what is said about its stages."""

from __future__ import annotations

import math
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction

from megatron_trinity.model.boxes import Box, cover
from megatron_trinity.planning.fake_ranks import BuiltRank, stage_ranks
from megatron_trinity.planning.flops import forward_flops, pairs_of_layers, stage_flops
from megatron_trinity.planning.parameters import total_parameters, training_state_bytes
from megatron_trinity.planning.sizes import ModelSizes
from megatron_trinity.planning.stages import Chunk

BALANCE = 0.10
"""How far from the mean the FLOPs of a pipeline stage may be."""


@dataclass(frozen=True)
class Stage:
    """A pipeline stage, for the reader.

    Attributes:
        parameters: the most that one of its ranks holds.
        state_bytes: weights, gradients and optimizer state of that rank.
        share: its FLOPs over the mean of the stages.
    """

    number: int
    chunks: tuple[Chunk, ...]
    parameters: int
    state_bytes: int
    share: float

    @property
    def holds(self) -> str:
        """For example `embedding, 1-4; 33-36`: a virtual stage between semicolons."""
        return "; ".join(describe(chunk) for chunk in self.chunks)


class LayoutCheck:
    """Collects the ranks of a layout as they are built, and judges them.

    A sample of ranks will do: each then stands for as many of its stage. Whether the parts of every
    tensor cover it is judged once all ranks are there.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.sizes = ModelSizes.from_args(args)
        self.expected = total_parameters(self.sizes, args.padded_vocab_size)
        self.ranks_of_stage = [len(ranks) for ranks in stage_ranks(args)]
        self._stages: dict[int, list[BuiltRank]] = defaultdict(list)
        self._boxes: Counter[Box] = Counter()

    def add(self, built: BuiltRank) -> None:
        """Take in one more rank."""
        self._boxes.update(built.boxes)
        # Boxes are many, and by now counted.
        self._stages[built.stage].append(replace(built, boxes=()))

    @property
    def built(self) -> int:
        """Ranks so far."""
        return sum(len(ranks) for ranks in self._stages.values())

    @property
    def is_complete(self) -> bool:
        """Whether every rank is there."""
        return self.built == self.args.world_size

    def parameters(self) -> Fraction:
        """Of the model, as the ranks have them: copies are counted once."""
        return sum(
            (
                Fraction(self.ranks_of_stage[stage], len(ranks)) * sum(r.unique for r in ranks)
                for stage, ranks in self._stages.items()
            ),
            Fraction(0),
        )

    def stages(self) -> list[Stage]:
        """The stages that have a rank, in order."""
        length = self.args.seq_length
        batch = (length, *pairs_of_layers(self.sizes, [length]))
        mean = forward_flops(self.sizes, *batch) / len(self.ranks_of_stage)
        stages = []
        for number, ranks in sorted(self._stages.items()):
            chunks = ranks[0].chunks
            kinds = [kind for chunk in chunks for _, kind in chunk.layers]
            has_lm_head = any(chunk.has_lm_head for chunk in chunks)
            flops = stage_flops(self.sizes, kinds, has_lm_head, *batch)
            fullest = max(ranks, key=lambda rank: rank.dense + rank.expert)
            state = training_state_bytes(
                fullest.dense,
                fullest.expert,
                fullest.dense_ranks,
                fullest.expert_ranks,
                fullest.adamw,
                2 if self.args.grad_reduce_in_bf16 else 4,
            )
            parameters = fullest.dense + fullest.expert
            stages.append(Stage(number, chunks, parameters, state, flops / mean))
        return stages

    def problems(self) -> list[str]:
        """What is wrong, one line each; empty if nothing is."""
        return [
            *self._wrong_ranks(),
            *self._wrong_layers(),
            *self._wrong_sum(),
            *self._wrong_balance(),
            *(self._wrong_cover() if self.is_complete else ()),
        ]

    def _wrong_ranks(self) -> Iterable[str]:
        for number, ranks in sorted(self._stages.items()):
            first = ranks[0]
            for other in ranks[1:]:
                if other.chunks != first.chunks:
                    yield f"stage {number}: ranks {first.rank} and {other.rank} differ in layers"
        for number in range(len(self.ranks_of_stage)):
            if number not in self._stages:
                yield f"stage {number} has no rank"

    def _wrong_layers(self) -> Iterable[str]:
        stages = [ranks[0].chunks for _, ranks in sorted(self._stages.items())]
        # Chunk 0 of every stage, then chunk 1 of every stage, ...
        chunks = [chunk for row in zip(*stages, strict=True) for chunk in row]
        layers = [layer for chunk in chunks for layer in chunk.layers]
        if layers != list(enumerate(self.sizes.layer_kinds())):
            yield f"the stages do not hold layers 1 to {self.sizes.num_layers} in order"
        if [chunk.has_embedding for chunk in chunks] != [True, *[False] * (len(chunks) - 1)]:
            yield "the embedding is not on the first stage alone"
        if [chunk.has_lm_head for chunk in chunks] != [*[False] * (len(chunks) - 1), True]:
            yield "the LM head is not on the last stage alone"

    def _wrong_sum(self) -> Iterable[str]:
        parameters = self.parameters()
        if parameters != self.expected:
            held = f"{float(parameters):,} parameters"
            yield f"the ranks hold {held}, the model has {self.expected:,}"

    def _wrong_balance(self) -> Iterable[str]:
        for stage in self.stages():
            if abs(stage.share - 1) > BALANCE:
                yield (
                    f"stage {stage.number} has {stage.share:.3f} of the mean stage's FLOPs; "
                    f"at most {BALANCE:.0%} from the mean are balanced"
                )

    def _wrong_cover(self) -> Iterable[str]:
        whole = {box.key: math.prod(box.whole) for box in self._boxes}
        if sum(whole.values()) != self.expected:
            yield f"the tensors have {sum(whole.values()):,} parameters, not {self.expected:,}"
        for key, (fewest, most) in cover(self._boxes).items():
            if not 0 < fewest == most:
                yield f"{key}: some values are on {fewest} ranks, others on {most}"


def describe(chunk: Chunk) -> str:
    """For example `embedding, 1-4`."""
    parts = []
    if chunk.has_embedding:
        parts.append("embedding")
    if chunk.layers:
        first, last = chunk.layers[0][0] + 1, chunk.layers[-1][0] + 1
        parts.append(str(first) if first == last else f"{first}-{last}")
    if chunk.has_lm_head:
        parts.append("LM head")
    return ", ".join(parts)


SUMMARY_HEAD = (
    "| preset | GPUs | DP | PP x chunks | EP | least and most FLOPs of a stage, over the mean | "
    "largest state of a rank |\n|---|---|---|---|---|---|---|"
)


def summary_row(preset: str, check: LayoutCheck) -> str:
    """A row under `SUMMARY_HEAD` in Markdown."""
    args, stages = check.args, check.stages()
    shares = [stage.share for stage in stages]
    state = max(stage.state_bytes for stage in stages)
    pipeline = f"{args.pipeline_model_parallel_size} x {len(stages[0].chunks)}"
    return (
        f"| {preset} | {args.world_size} | {args.data_parallel_size} | {pipeline} | "
        f"{args.expert_model_parallel_size} | {min(shares):.3f}, {max(shares):.3f} | "
        f"{state / 1e9:.1f} GB |"
    )
