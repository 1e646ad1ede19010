"""How the model and the batch are laid out over ranks, and which layouts cannot be."""

from __future__ import annotations

from argparse import Namespace

from megatron_trinity.arguments.refusal import Refusal
from megatron_trinity.model.architecture import CP_COMM_TYPES

PARALLEL_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def _model_ranks(args: Namespace) -> int:
    return int(
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size
    )


def _expert_tensor_ranks(args: Namespace) -> int:
    return int(args.expert_tensor_parallel_size or args.tensor_model_parallel_size)


def _heads_left(args: Namespace) -> int:
    """Query groups of one tensor-parallel rank; 1 where ranks share a group."""
    return int(max(1, args.num_query_groups // args.tensor_model_parallel_size))


def _expert_ranks(args: Namespace) -> int:
    return int(
        _expert_tensor_ranks(args)
        * args.expert_model_parallel_size
        * args.pipeline_model_parallel_size
    )


def data_ranks(args: Namespace) -> int:
    return int(args.world_size) // _model_ranks(args)


PARALLELISM_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "parallel-sizes",
        lambda a: any(
            size is not None and size < 1 for size in (getattr(a, n) for n in PARALLEL_SIZES)
        ),
        "a parallel size is below 1; leave out {--tensor-model-parallel-size} and the like, or "
        "use 1 or more",
    ),
    Refusal(
        "model-ranks",
        lambda a: a.world_size % _model_ranks(a) != 0,
        "{world_size|the} ranks cannot be split into {--tensor-model-parallel-size=} x "
        "{--pipeline-model-parallel-size=} x {--context-parallel-size=}; start a multiple of "
        "their product, or lower one of them",
    ),
    Refusal(
        "expert-ranks",
        lambda a: a.world_size % _expert_ranks(a) != 0,
        "{world_size|the} ranks cannot be split into {--expert-model-parallel-size=} x "
        "{--expert-tensor-parallel-size} x {--pipeline-model-parallel-size=}; start a multiple "
        "of their product, or lower one of them",
    ),
    Refusal(
        "experts-over-ranks",
        lambda a: a.num_experts % a.expert_model_parallel_size != 0,
        "{--num-experts=} do not divide over {--expert-model-parallel-size=}; use a divisor",
    ),
    Refusal(
        "tensor-over-groups",
        lambda a: (
            a.num_query_groups % a.tensor_model_parallel_size != 0
            and a.tensor_model_parallel_size % a.num_query_groups != 0
        ),
        "{--num-query-groups=} do not fit {--tensor-model-parallel-size=}; one must divide the "
        "other",
    ),
    Refusal(
        "heads-over-groups",
        lambda a: a.num_attention_heads % a.num_query_groups != 0,
        "{--num-attention-heads=} do not divide into {--num-query-groups=}; use a divisor",
    ),
    Refusal(
        "tensor-without-sequence",
        lambda a: a.tensor_model_parallel_size > 1 and not a.sequence_parallel,
        "{--tensor-model-parallel-size=}: Megatron trains experts under tensor parallelism only "
        "with sequence parallelism; use {--sequence-parallel} as well",
    ),
    Refusal(
        "heads-over-tensor",
        lambda a: a.num_attention_heads % a.tensor_model_parallel_size != 0,
        "{--num-attention-heads=} do not divide over {--tensor-model-parallel-size=}; use a "
        "divisor",
    ),
    Refusal(
        "experts-over-tensor",
        lambda a: a.moe_ffn_hidden_size % _expert_tensor_ranks(a) != 0,
        "{--moe-ffn-hidden-size=} does not divide over {--expert-tensor-parallel-size}, which is "
        "{--tensor-model-parallel-size} if it is not given; use a divisor",
    ),
    Refusal(
        "dense-size",
        lambda a: (
            a.ffn_hidden_size is not None
            and a.ffn_hidden_size % (2 * a.tensor_model_parallel_size) != 0
        ),
        "{--ffn-hidden-size=}: Megatron's warm-up halves the part of each of "
        "{--tensor-model-parallel-size=} ranks; use a multiple of twice that",
    ),
    Refusal(
        "context-parallel-kind",
        lambda a: a.context_parallel_size > 1 and not set(a.cp_comm_type) <= set(CP_COMM_TYPES),
        "{--cp-comm-type}: ring attention (p2p) knows no window, and local layers have one; use "
        "all_gather or a2a",
    ),
    Refusal(
        "context-parallel-heads",
        lambda a: "a2a" in a.cp_comm_type and _heads_left(a) % a.context_parallel_size != 0,
        "{--cp-comm-type} a2a splits the heads that tensor parallelism leaves, and "
        "{--num-query-groups=} do not divide over {--tensor-model-parallel-size=} x "
        "{--context-parallel-size=}; use {--cp-comm-type} all_gather",
    ),
    Refusal(
        "context-parallel-length",
        lambda a: a.context_parallel_size > 1 and a.seq_length % (2 * a.context_parallel_size) != 0,
        "{--seq-length=} cannot be cut into two chunks for each rank of "
        "{--context-parallel-size=}; use a multiple of twice that",
    ),
    Refusal(
        "sequence-parallel-length",
        lambda a: (
            a.sequence_parallel
            and a.seq_length % (a.context_parallel_size * a.tensor_model_parallel_size) != 0
        ),
        "{--seq-length=} does not divide over {--tensor-model-parallel-size=} x "
        "{--context-parallel-size=} under {--sequence-parallel}; use a multiple of their product",
    ),
    Refusal(
        "hybrid-context-parallel",
        lambda a: a.hybrid_context_parallel or a.hierarchical_context_parallel_sizes,
        "{--hybrid-context-parallel} and {--hierarchical-context-parallel-sizes} split sequences "
        "in ways that Trinity's attention does not know; use {--context-parallel-size} alone",
    ),
    Refusal(
        "recompute-layers",
        lambda a: a.recompute_granularity == "full" and a.recompute_num_layers is None,
        "{--recompute-granularity} full needs to know of how many layers; give "
        "{--recompute-num-layers}",
    ),
    Refusal(
        "batch-over-ranks",
        lambda a: (
            a.global_batch_size is not None
            and a.global_batch_size % (a.micro_batch_size * data_ranks(a)) != 0
        ),
        "{--global-batch-size=} is no multiple of {--micro-batch-size=} times the data-parallel "
        "ranks; change one of them",
    ),
)
