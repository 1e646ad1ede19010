"""What a rank puts on the wire in a step, by kind of collective and group of ranks.

`bytes` are what a rank puts in, whatever the algorithm: the whole buffer of an all-reduce or a
reduce-scatter, its own part of an all-gather, what it has for all ranks of an all-to-all.
`sent` is what leaves the rank by rings: (n - 1)/n of the whole buffer, twice that of an all-reduce.

Shapes as in `activations`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_trinity.model.context_parallel import chunks_of, pieces_of
from megatron_trinity.planning.activations import Activations, recomputed_modules
from megatron_trinity.planning.schedule import micro_batches
from megatron_trinity.planning.stages import Chunk
from megatron_trinity.planning.state import StageState, data_ranks, is_sharded

FP32 = 4
DATA, EXPERT_DATA, INSTANCES = "data", "experts' data", "optimizer instances"
TENSOR, EXPERT_TENSOR, EXPERT, CONTEXT, PIPELINE = (
    "tensor",
    "expert tensor",
    "expert",
    "context",
    "pipeline",
)
ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, ALL_TO_ALL, SEND = (
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "all_to_all",
    "send",
)


@dataclass(frozen=True)
class Traffic:
    """Of one kind in one group.

    Attributes:
        ranks: of the group.
        bytes: that a rank puts in, over the step.
        calls: over the step.
        hidden: whether computation goes on meanwhile.
    """

    kind: str
    group: str
    ranks: int
    bytes: int
    calls: int
    hidden: bool = False

    @property
    def sent(self) -> float:
        """Bytes that leave the rank."""
        if self.kind == SEND:
            return self.bytes
        if self.kind == ALL_GATHER:
            return self.bytes * (self.ranks - 1)
        rounds = 2 if self.kind == ALL_REDUCE else 1
        return rounds * self.bytes * (self.ranks - 1) / self.ranks


def stage_traffic(
    activations: Activations, stage: int, chunks: Sequence[Chunk], state: StageState
) -> list[Traffic]:
    """Of a rank of a stage, in a step; without what is exchanged once a step in a few bytes."""
    args = activations.args
    number = micro_batches(args)
    per_micro_batch = [traffic for chunk in chunks for traffic in chunk_traffic(activations, chunk)]
    per_micro_batch += pipeline_traffic(activations, stage, len(chunks))
    of_step = [
        Traffic(t.kind, t.group, t.ranks, number * t.bytes, number * t.calls, t.hidden)
        for t in per_micro_batch
    ]
    return merged([*of_step, *data_traffic(args, state)])


def merged(parts: Sequence[Traffic]) -> list[Traffic]:
    """One of each kind in each group, without those of one rank."""
    found: dict[tuple[str, str, int, bool], tuple[int, int]] = {}
    for part in parts:
        key = part.kind, part.group, part.ranks, part.hidden
        size, calls = found.get(key, (0, 0))
        if part.ranks > 1 and part.bytes:
            found[key] = size + part.bytes, calls + part.calls
    return [
        Traffic(kind, group, ranks, size, calls, hidden)
        for (kind, group, ranks, hidden), (size, calls) in found.items()
    ]


def data_traffic(args: Namespace, state: StageState) -> Iterator[Traffic]:
    """Gradients and weights of a step, a call a bucket. Of matrices that Muon has cut nothing."""
    ranks, instances = data_ranks(args), args.num_distributed_optimizer_instances
    for key, layout in state.buffers:
        experts = key.is_expert_parallel
        group, size = (EXPERT_DATA, ranks.experts) if experts else (DATA, ranks.dense)
        elements = layout.bucket_indices[-1][1]
        calls = len(layout.bucket_indices)
        gradients = elements * key.grad_dtype.itemsize
        hidden = bool(args.overlap_grad_reduce)
        if not is_sharded(args):
            yield Traffic(ALL_REDUCE, group, size, gradients, calls, hidden)
            continue
        yield Traffic(REDUCE_SCATTER, group, size, gradients, calls, hidden)
        if instances > 1:
            yield Traffic(ALL_REDUCE, INSTANCES, instances, gradients // size, calls, hidden)
        weights = elements * key.param_dtype.itemsize // size
        yield Traffic(ALL_GATHER, group, size, weights, calls, bool(args.overlap_param_gather))


def about_data_traffic(args: Namespace, state: StageState) -> Iterator[Traffic]:
    """The same without the padding and the number of buckets; of sharded state."""
    ranks, held = data_ranks(args), state.about()
    routed = sum(number * p.numel for p, number in state.counted.items() if p.routed)
    share = routed / state.numel
    for group, size, part in (
        (DATA, ranks.dense, 1 - share),
        (EXPERT_DATA, ranks.experts, share),
    ):
        hidden = bool(args.overlap_grad_reduce)
        yield Traffic(REDUCE_SCATTER, group, size, int(part * held.gradients), 1, hidden)
        weights = int(part * held.weights) // size
        yield Traffic(ALL_GATHER, group, size, weights, 1, bool(args.overlap_param_gather))


def pipeline_traffic(activations: Activations, stage: int, chunks: int) -> Iterator[Traffic]:
    """Hidden states to the next stage, their gradients to the one before, of one micro-batch."""
    stages = activations.args.pipeline_model_parallel_size
    if stages == 1:
        return
    # The first chunk has nothing before it, the last nothing behind it.
    sends = 2 * chunks - (stage == 0) - (stage == stages - 1)
    yield Traffic(SEND, PIPELINE, stages, sends * activations.hidden, sends)


def chunk_traffic(activations: Activations, chunk: Chunk) -> Iterator[Traffic]:
    """Forward and backward of a micro-batch, with what is computed again, within a stage."""
    args = activations.args
    layers = list(chunk.kinds)
    full = args.recompute_granularity == "full"
    modules = recomputed_modules(args)
    block = full and args.recompute_method == "block"
    for number, kind in enumerate(layers):
        again = full and (not block or number < args.recompute_num_layers)
        yield from _attention(activations, kind.is_global, again, "core_attn" in modules)
        if kind.is_moe:
            of_moe = again or "moe" in modules
            yield from _dispatch(activations, of_moe)
            if activations.sizes.num_shared_experts:
                yield from _pair(activations, of_moe or "shared_experts" in modules)
        else:
            yield from _pair(activations, again or "mlp" in modules)
    if chunk.has_embedding:
        yield from _embedding(activations)
    if chunk.has_lm_head:
        yield from _head(activations)


def _pair(activations: Activations, again: bool) -> Iterator[Traffic]:
    """A layer whose output is split and one whose input is, under sequence parallelism: inputs
    are gathered, outputs summed and scattered; backward both, and inputs are gathered again."""
    size = activations.args.tensor_model_parallel_size
    whole = activations.hidden * size
    gathers, scatters = 3 + again, 2 + again
    yield Traffic(ALL_GATHER, TENSOR, size, gathers * activations.hidden, gathers)
    yield Traffic(REDUCE_SCATTER, TENSOR, size, scatters * whole, scatters)


def _attention(
    activations: Activations, is_global: bool, again: bool, core_again: bool
) -> Iterator[Traffic]:
    yield from _pair(activations, again)
    args, sizes = activations.args, activations.sizes
    size = args.context_parallel_size
    heads = sizes.num_attention_heads // args.tensor_model_parallel_size
    groups = max(sizes.num_query_groups // args.tensor_model_parallel_size, 1)
    of_head = activations.whole_tokens * sizes.head_dim * activations.value
    times = 1 + (again or core_again)
    if "a2a" in args.cp_comm_type:
        tensors = (heads, groups, groups, heads)
        calls = (times + 1) * len(tensors)
        yield Traffic(ALL_TO_ALL, CONTEXT, size, (times + 1) * sum(tensors) * of_head, calls)
        return
    pairs = 2 * groups * of_head
    if is_global:
        yield Traffic(ALL_GATHER, CONTEXT, size, times * pairs, times)
        yield Traffic(REDUCE_SCATTER, CONTEXT, size, pairs * size, 1)
        return
    row = args.micro_batch_size * 2 * groups * sizes.head_dim * activations.value
    # Of the mean rank: who has the ends of the sequence gives less.
    rows = sum(window_rows(args, sizes.window, rank) for rank in range(size)) if size > 1 else 0
    yield Traffic(ALL_TO_ALL, CONTEXT, size, (times + 1) * rows * row // size, times + 1)


def window_rows(args: Namespace, window: int, rank: int) -> int:
    """Tokens of a sequence that a context-parallel rank gives to windows of other chunks."""
    ranks = args.context_parallel_size
    length = args.seq_length // (2 * ranks)
    own = chunks_of(rank, ranks)
    return sum(
        length - piece.first
        for target in range(2 * ranks)
        for piece in pieces_of(target, length, window)
        if piece.source in own
    )


def _dispatch(activations: Activations, again: bool) -> Iterator[Traffic]:
    """Tokens to their experts and back: hidden states both ways, probabilities one way."""
    args, sizes, c = activations.args, activations.sizes, activations.value
    rows = activations.tokens * sizes.topk
    hidden, times = sizes.hidden_size * c, 1 + again
    expert, tensor = args.expert_model_parallel_size, args.expert_tensor_parallel_size
    # Backward the same again; the probabilities' gradients come back.
    size = rows * ((times + 1) * (2 * hidden + FP32))
    yield Traffic(ALL_TO_ALL, EXPERT, expert, size, 3 * (times + 1))
    # What experts give back is summed over tensor-parallel ranks in fp32.
    summed, chances = sizes.hidden_size * FP32, FP32
    gathered = times * (hidden + chances) + summed
    scattered = times * summed + hidden + chances
    yield Traffic(ALL_GATHER, EXPERT_TENSOR, tensor, rows * gathered, 2 * times + 1)
    yield Traffic(REDUCE_SCATTER, EXPERT_TENSOR, tensor, rows * tensor * scattered, times + 2)


def _embedding(activations: Activations) -> Iterator[Traffic]:
    size = activations.args.tensor_model_parallel_size
    yield Traffic(REDUCE_SCATTER, TENSOR, size, activations.hidden * size, 1)
    yield Traffic(ALL_GATHER, TENSOR, size, activations.hidden, 1)


def _head(activations: Activations) -> Iterator[Traffic]:
    """The hidden states of all tokens, and two sums over the vocabulary."""
    size, tokens = activations.args.tensor_model_parallel_size, activations.whole_tokens
    yield Traffic(ALL_GATHER, TENSOR, size, activations.hidden, 1)
    yield Traffic(REDUCE_SCATTER, TENSOR, size, activations.hidden * size, 1)
    yield Traffic(ALL_REDUCE, TENSOR, size, tokens * 4 * FP32, 2)
