"""What the fullest rank of each pipeline stage holds at its peak, and when that is."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from dataclasses import dataclass

from megatron_trinity.optimizer.muon import BATCH_ELEMENTS, BATCH_SHARE
from megatron_trinity.planning.activations import Activations, recomputed_modules
from megatron_trinity.planning.kernels import Kernels
from megatron_trinity.planning.rank_parameters import (
    RankParameter,
    matrix_width,
    optimizer_kinds,
)
from megatron_trinity.planning.schedule import Moment, passes
from megatron_trinity.planning.sizes import LayerKind
from megatron_trinity.planning.stages import Chunk, stage_chunks, unlike_stages
from megatron_trinity.planning.state import (
    StageState,
    StateBytes,
    copies_in_fp8,
    data_ranks,
    is_sharded,
)

FP32 = 4
MUON_TEMPORARIES = 4
"""Of a batch of matrices in fp32, what its iteration has at once (docs/optimizer.md)."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of the fullest rank of a stage.

    Attributes:
        state: weights, gradients and optimizer state.
        copies: of weights in FP8.
        kept: for backward passes, by part, at the peak.
        working: of the pass, or of the optimizer's step, that has the peak.
        moment: which that is.
    """

    stage: int
    chunks: tuple[Chunk, ...]
    parameters: int
    state: StateBytes
    copies: int
    kept: Counter[str]
    working: int
    moment: str

    @property
    def peak(self) -> int:
        return self.state.total + self.copies + self.kept.total() + self.working


def stage_memories(args: Namespace, kernels: Kernels, exact: bool = True) -> list[StageMemory]:
    """Of every stage; not `exact` of those that differ, without the padding of buffers."""
    stages = stage_chunks(args)
    return [
        stage_memory(args, kernels, stage, chunks, exact)
        for stage, chunks in (enumerate(stages) if exact else unlike_stages(stages))
    ]


def stage_memory(
    args: Namespace, kernels: Kernels, stage: int, chunks: tuple[Chunk, ...], exact: bool = True
) -> StageMemory:
    """Of one."""
    state = StageState(args, stage, chunks)
    activations = Activations(args, kernels)
    held = [activations.chunk(chunk) for chunk in chunks]
    work = [chunk_work(activations, chunk) for chunk in chunks]
    owned = state.counted

    def size(moment: Moment) -> int:
        kept = sum(n * of.total() for n, of in zip(moment.in_flight, held, strict=True))
        return kept + (work[moment.chunk] if moment.backward else 0)

    worst = max(passes(args, stage, len(chunks)), key=size)
    in_optimizer = muon_work(args, owned)
    held_state = state.fullest() if exact else state.about()
    common = (stage, chunks, state.numel, held_state, copies_in_fp8(args, owned))
    if in_optimizer > size(worst):
        return StageMemory(*common, Counter(), in_optimizer, "the optimizer's step")
    kept: Counter[str] = Counter({"angles of RoPE": activations.rope})
    for number, of in zip(worst.in_flight, held, strict=True):
        for part, bytes_ in of.items():
            kept[part] += number * bytes_
    # Muon's batch has memory of its own at all times.
    batch = in_optimizer // MUON_TEMPORARIES
    working = batch + (work[worst.chunk] if worst.backward else 0)
    flying = ", ".join(map(str, worst.in_flight))
    where = f" of chunk {worst.chunk + 1}" if len(chunks) > 1 else ""
    moment = f"the {'backward' if worst.backward else 'forward'} pass{where}, {flying} in flight"
    return StageMemory(*common, kept, working, moment)


def chunk_work(activations: Activations, chunk: Chunk) -> int:
    """What the backward pass of a chunk has at once on top of what was kept.

    A layer's activations, as far as they are computed again, and the gradients within it; or the
    head's, if that is more.
    """
    args = activations.args
    work = [0, *(_layer_work(activations, kind) for kind in {*chunk.kinds})]
    recomputed = [activations.layer(kind).total() for kind in chunk.kinds]
    if args.recompute_granularity == "full":
        run = args.recompute_num_layers if args.recompute_method == "uniform" else 1
        again = max(
            (sum(recomputed[first : first + run]) for first in range(0, len(recomputed), run)),
            default=0,
        )
    elif args.recompute_granularity:
        modules = recomputed_modules(args)
        again = max(
            (
                activations.layer(kind).total() - activations.layer(kind, modules).total()
                for kind in chunk.kinds
            ),
            default=0,
        )
    else:
        again = 0
    layers = max(work) + max(again, 0)
    return max(layers, head_work(activations)) if chunk.has_lm_head else layers


def _layer_work(activations: Activations, kind: LayerKind) -> int:
    """Gradients that a layer's backward pass has at once, at the first product of its MLP."""
    args, sizes, c = activations.args, activations.sizes, activations.value
    h, kernels = sizes.hidden_size, activations.kernels
    hidden = 2 * activations.hidden  # of the layer's output and of the residual
    if not kind.is_moe:
        width = sizes.ffn_hidden_size // args.tensor_model_parallel_size
        weight = 0 if kernels.accumulation else 2 * width * h * c
        return hidden + activations.whole_tokens * (2 * width + h) * c + weight
    width = sizes.moe_ffn_hidden_size // args.expert_tensor_parallel_size
    experts = sizes.num_experts // args.expert_model_parallel_size
    weight = 0 if kernels.accumulation else experts * 2 * width * h * c
    return hidden + activations.rows * (2 * width + h) * c + weight


def head_work(activations: Activations) -> int:
    """Of the LM head's backward pass: a chunk's logits, and gradients of what it has as inputs."""
    from megatron_trinity.model.loss import chunk_length

    args, tokens, c = activations.args, activations.whole_tokens, activations.value
    width = args.padded_vocab_size // args.tensor_model_parallel_size
    of_logit = activations.bytes_of_logit
    chunk = chunk_length(tokens, width, args.loss_chunk_size, of_logit)
    of_hidden = tokens * args.hidden_size * (c + (FP32 if chunk < tokens else 0))
    weight = 0 if activations.kernels.accumulation else width * args.hidden_size * c
    return int(chunk * width * of_logit + of_hidden + weight)


def muon_work(args: Namespace, parameters: Counter[RankParameter]) -> int:
    """What Muon's step has at once: its largest batch of matrices, and the iteration's own."""
    kinds, ranks = optimizer_kinds(args), data_ranks(args)
    largest = 0
    for routed in (False, True):
        held = [p for p in parameters if p.routed == routed and kinds[p.group] == "muon"]
        shards = (ranks.experts if routed else ranks.dense) if is_sharded(args) else 1
        total = sum(parameters[p] * p.numel for p in held)
        limit = min(total // shards // BATCH_SHARE, BATCH_ELEMENTS)
        for parameter in held:
            matrix = args.hidden_size * matrix_width(args, parameter)
            largest = max(largest, max(1, limit // matrix) * matrix)
    return MUON_TEMPORARIES * FP32 * largest
