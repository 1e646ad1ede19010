"""How long a step takes, from FLOPs, bytes and what is assumed of a machine."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_trinity.optimizer.newton_schulz import flops as newton_schulz_flops
from megatron_trinity.planning import flops as parts_of
from megatron_trinity.planning.activations import Activations, recomputed_modules
from megatron_trinity.planning.flops import (
    BACKWARD,
    forward_parts,
    pairs_of_layers,
    training_flops,
)
from megatron_trinity.planning.kernels import Kernels
from megatron_trinity.planning.machines import Assumptions, Machine
from megatron_trinity.planning.rank_parameters import (
    RankParameter,
    matrix_width,
    optimizer_kinds,
)
from megatron_trinity.planning.schedule import idle_share, micro_batches
from megatron_trinity.planning.sizes import ModelSizes
from megatron_trinity.planning.stages import Chunk, stage_chunks, unlike_stages
from megatron_trinity.planning.state import StageState, data_ranks, is_sharded
from megatron_trinity.planning.wire import (
    CONTEXT,
    DATA,
    EXPERT,
    EXPERT_DATA,
    EXPERT_TENSOR,
    TENSOR,
    Traffic,
    about_data_traffic,
    chunk_traffic,
    data_traffic,
    merged,
    pipeline_traffic,
)

PASSES_OVER_KEPT = 4
"""How often what a layer keeps goes through memory in a forward and a backward pass."""
PASSES_OVER_STATE = 2
"""The same of the optimizer's state in its step: read and written."""


@dataclass(frozen=True)
class Estimate:
    """Of a step; seconds.

    Attributes:
        products, attention: of the busiest stage, with what is computed again.
        elementwise: what goes through memory between them.
        waiting: for ranks of the same replica, on the wire.
        idle: at the ends of the pipeline.
        data: gradients and weights that nothing hides.
        optimizer: its step.
        tokens: of a step.
        model_flops: of a step, over all ranks, without what is computed again.
    """

    products: float
    attention: float
    elementwise: float
    waiting: float
    idle: float
    data: float
    optimizer: float
    tokens: int
    model_flops: int
    ranks: int
    peak: float

    @property
    def step(self) -> float:
        of_stage = self.products + self.attention + self.elementwise + self.waiting
        return of_stage + self.idle + self.data + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step

    @property
    def mfu(self) -> float:
        """Over the peak of bf16, whatever the precision."""
        return self.model_flops / (self.step * self.ranks * self.peak)


def estimate(
    args: Namespace,
    kernels: Kernels,
    machine: Machine,
    node: int,
    assumed: Assumptions | None = None,
    exact: bool = True,
) -> Estimate:
    """Args: node: GPUs of a node; exact: with the padding of buffers."""
    assumed = assumed or Assumptions()
    sizes, activations = ModelSizes.from_args(args), Activations(args, kernels)
    stages = stage_chunks(args)
    number = micro_batches(args)
    batch = args.micro_batch_size * args.seq_length
    pairs = tuple(args.micro_batch_size * n for n in pairs_of_layers(sizes, [args.seq_length]))
    busiest = (0.0, 0.0, 0.0, 0.0)
    for stage, chunks in unlike_stages(stages):
        found = _of_micro_batch(activations, chunks, (batch, *pairs), machine, assumed)
        traffic = [t for chunk in chunks for t in chunk_traffic(activations, chunk)]
        traffic += pipeline_traffic(activations, stage, len(chunks))
        waiting = wire_seconds(args, merged(traffic), machine, node, assumed)
        busiest = max(busiest, (*found, waiting), key=sum)
    products, attention, elementwise, waiting = (number * seconds for seconds in busiest)
    work = products + attention + elementwise + waiting
    owned = [StageState(args, stage, chunks) for stage, chunks in unlike_stages(stages)]
    data = max(_exposed(args, state, work, machine, node, assumed, exact) for state in owned)
    return Estimate(
        products,
        attention,
        elementwise,
        waiting,
        work * idle_share(args, len(stages[0])),
        data,
        max(_optimizer(args, state, machine, assumed) for state in owned),
        args.global_batch_size * args.seq_length,
        args.global_batch_size
        * training_flops(sizes, args.seq_length, *pairs_of_layers(sizes, [args.seq_length])),
        args.world_size,
        machine.bf16,
    )


def _of_micro_batch(
    activations: Activations,
    chunks: Sequence[Chunk],
    batch: tuple[int, int, int],
    machine: Machine,
    assumed: Assumptions,
) -> tuple[float, float, float]:
    """Products, attention and elementwise work of a stage, forward and backward."""
    args, kernels, sizes = activations.args, activations.kernels, activations.sizes
    split = args.tensor_model_parallel_size * args.context_parallel_size
    tokens, *pairs = batch
    dense = machine.bf16 * assumed.products
    linear = machine.fp8 * assumed.fp8 if kernels.fp8 else dense
    grouped = linear if kernels.fp8 else machine.bf16 * assumed.grouped
    speed = {
        parts_of.PROJECTIONS: linear,
        parts_of.GATE: linear,
        parts_of.DENSE: linear,
        parts_of.SHARED: linear,
        parts_of.ROUTED: grouped,
        parts_of.ROUTER: dense,
        parts_of.HEAD: dense,
    }
    attention = {parts_of.GLOBAL, parts_of.LOCAL}
    products = core = elementwise = 0.0
    for chunk in chunks:
        found = forward_parts(sizes, chunk.kinds, chunk.has_lm_head, tokens, pairs[0], pairs[1])
        for part, count in found.items():
            times = 1 + BACKWARD + _again(args, part)
            if part in attention:
                core += times * count / split / (machine.bf16 * assumed.attention)
            else:
                products += times * count / split / speed[part]
        kept = sum(activations.layer(kind).total() for kind in chunk.kinds)
        passes = PASSES_OVER_KEPT + (2 if args.recompute_granularity == "full" else 0)
        elementwise += passes * kept / (machine.bandwidth * assumed.bandwidth)
    return products, core, elementwise


def _again(args: Namespace, part: str) -> int:
    """How often a part's forward pass is computed again in the backward pass."""
    if part == parts_of.HEAD:
        return 1  # logits are made twice
    if args.recompute_granularity == "full":
        return 1
    if args.recompute_granularity != "selective":
        return 0
    modules = {
        "core_attn": (parts_of.GLOBAL, parts_of.LOCAL),
        "mlp": (parts_of.DENSE,),
        "moe": (parts_of.ROUTER, parts_of.ROUTED, parts_of.SHARED),
        "shared_experts": (parts_of.SHARED,),
    }
    again = {part for name in recomputed_modules(args) for part in modules.get(name, ())}
    return int(part in again)


def wire_seconds(
    args: Namespace,
    traffic: Iterable[Traffic],
    machine: Machine,
    node: int,
    assumed: Assumptions,
) -> float:
    """Args: node: GPUs of a node, in which the innermost groups of ranks lie."""
    fast, slow = machine.nvlink * assumed.nvlink, machine.network * assumed.network
    tensor = args.tensor_model_parallel_size
    spans = {
        TENSOR: tensor,
        CONTEXT: tensor * args.context_parallel_size,
        EXPERT_TENSOR: args.expert_tensor_parallel_size,
        EXPERT: args.expert_tensor_parallel_size * args.expert_model_parallel_size,
        DATA: args.world_size // args.pipeline_model_parallel_size,
        EXPERT_DATA: args.world_size // args.pipeline_model_parallel_size,
    }
    return sum(
        part.sent / (fast if spans.get(part.group, args.world_size) <= node else slow)
        for part in traffic
    )


def _exposed(
    args: Namespace,
    state: StageState,
    work: float,
    machine: Machine,
    node: int,
    assumed: Assumptions,
    exact: bool,
) -> float:
    """Seconds of gradients and weights on the wire that no backward or forward pass hides."""
    traffic = merged(list(data_traffic(args, state) if exact else about_data_traffic(args, state)))
    hidden = wire_seconds(args, (t for t in traffic if t.hidden), machine, node, assumed)
    open_ = wire_seconds(args, (t for t in traffic if not t.hidden), machine, node, assumed)
    # Gradients are final with the last micro-batch alone.
    last = work / micro_batches(args)
    return open_ + max(0.0, hidden - assumed.overlap * last)


def _optimizer(args: Namespace, state: StageState, machine: Machine, assumed: Assumptions) -> float:
    """Muon's iteration, shared by the ranks, and memory that the step goes through."""
    ranks, kinds = data_ranks(args), optimizer_kinds(args)
    steps = args.muon_num_ns_steps if args.optimizer == "muon" else 0
    count = 0.0
    for parameter, number in state.counted.items():
        if kinds[parameter.group] == "muon":
            shards = ranks.experts if parameter.routed else ranks.dense
            count += number * _iteration(args, parameter, steps) / shards
    held = state.about()
    traffic = PASSES_OVER_STATE * held.optimizer + held.weights
    memory = traffic / (machine.bandwidth * assumed.bandwidth)
    shared = 1 if is_sharded(args) or args.optimizer == "muon" else 0
    return count * shared / (machine.bf16 * assumed.products) + memory


def _iteration(args: Namespace, parameter: RankParameter, steps: int) -> float:
    """FLOPs of Newton-Schulz for the matrices in a rank's part of a parameter."""
    h, width = args.hidden_size, matrix_width(args, parameter)
    return parameter.numel / (width * h) * newton_schulz_flops(h, width, steps)
