"""What cannot work, why, and what to do instead: one table, checked before anything is built."""

from __future__ import annotations

from argparse import Namespace

from megatron_trinity.checkpoint.arguments import CHECKPOINT_REFUSALS
from megatron_trinity.errors import UsageError
from megatron_trinity.model.architecture import CP_COMM_TYPES
from megatron_trinity.moe.balancing import SIGN_DEFAULT, SMEBU_DEFAULTS
from megatron_trinity.optimizer.refusals import OPTIMIZER_REFUSALS
from megatron_trinity.refusal import Refusal


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


def _data_ranks(args: Namespace) -> int:
    return int(args.world_size) // _model_ranks(args)


def _ramp_batches(args: Namespace) -> list[str]:
    """The batch sizes of a ramp, as they are written."""
    ramp = args.step_batch_size_schedule or ""
    return [entry.partition(":")[2] for entry in ramp.replace(",", " ").split()]


MODEL_SIZES = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "num_experts",
)
PARALLEL_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "no-model",
        lambda a: any(getattr(a, name) is None for name in MODEL_SIZES),
        "no model is given; use --preset, or --num-layers, --hidden-size, --num-attention-heads, "
        "--num-experts and so on",
    ),
    Refusal(
        "parallel-sizes",
        lambda a: any(
            size is not None and size < 1 for size in (getattr(a, n) for n in PARALLEL_SIZES)
        ),
        "a parallel size is below 1; leave out --tensor-model-parallel-size and the like, or use "
        "1 or more",
    ),
    Refusal(
        "micro-batch",
        lambda a: a.micro_batch_size is None or a.micro_batch_size < 1,
        "--micro-batch-size {micro_batch_size}: use 1 or more",
    ),
    Refusal(
        "no-window",
        lambda a: a.sliding_window is None,
        "--sliding-window is not given; local layers need it",
    ),
    Refusal(
        "window-too-small",
        lambda a: a.sliding_window < 1,
        "--sliding-window {sliding_window}: a token sees at least itself; use 1 or more",
    ),
    Refusal(
        "global-every",
        lambda a: a.global_attn_every_n_layers < 1,
        "--global-attn-every-n-layers {global_attn_every_n_layers}: use 1 (all global) or more",
    ),
    Refusal(
        "dense-layers",
        lambda a: not 0 <= a.num_dense_layers < a.num_layers,
        "--num-dense-layers {num_dense_layers} of --num-layers {num_layers}: a Trinity model has "
        "at least one MoE layer",
    ),
    Refusal(
        "shared-experts",
        lambda a: a.num_shared_experts < 0,
        "--num-shared-experts {num_shared_experts}: use 0 or more",
    ),
    Refusal(
        "topk",
        lambda a: not 1 <= a.moe_router_topk <= a.num_experts,
        "--moe-router-topk {moe_router_topk} of --num-experts {num_experts}: use 1 to as many",
    ),
    Refusal(
        "model-ranks",
        lambda a: a.world_size % _model_ranks(a) != 0,
        "{world_size} ranks cannot be split into --tensor-model-parallel-size "
        "{tensor_model_parallel_size} x --pipeline-model-parallel-size "
        "{pipeline_model_parallel_size} x --context-parallel-size {context_parallel_size}; start a "
        "multiple of their product, or lower one of them",
    ),
    Refusal(
        "expert-ranks",
        lambda a: a.world_size % _expert_ranks(a) != 0,
        "{world_size} ranks cannot be split into --expert-model-parallel-size "
        "{expert_model_parallel_size} x --expert-tensor-parallel-size x "
        "--pipeline-model-parallel-size {pipeline_model_parallel_size}; start a multiple of their "
        "product, or lower one of them",
    ),
    Refusal(
        "experts-over-ranks",
        lambda a: a.num_experts % a.expert_model_parallel_size != 0,
        "--num-experts {num_experts} do not divide over --expert-model-parallel-size "
        "{expert_model_parallel_size}; use a divisor",
    ),
    Refusal(
        "tensor-over-groups",
        lambda a: (
            a.num_query_groups % a.tensor_model_parallel_size != 0
            and a.tensor_model_parallel_size % a.num_query_groups != 0
        ),
        "--num-query-groups {num_query_groups} do not fit --tensor-model-parallel-size "
        "{tensor_model_parallel_size}; one must divide the other",
    ),
    Refusal(
        "heads-over-groups",
        lambda a: a.num_attention_heads % a.num_query_groups != 0,
        "--num-attention-heads {num_attention_heads} do not divide into --num-query-groups "
        "{num_query_groups}; use a divisor",
    ),
    Refusal(
        "tensor-without-sequence",
        lambda a: a.tensor_model_parallel_size > 1 and not a.sequence_parallel,
        "--tensor-model-parallel-size {tensor_model_parallel_size}: Megatron trains experts under "
        "tensor parallelism only with sequence parallelism; use --sequence-parallel as well",
    ),
    Refusal(
        "heads-over-tensor",
        lambda a: a.num_attention_heads % a.tensor_model_parallel_size != 0,
        "--num-attention-heads {num_attention_heads} do not divide over "
        "--tensor-model-parallel-size {tensor_model_parallel_size}; use a divisor",
    ),
    Refusal(
        "experts-over-tensor",
        lambda a: a.moe_ffn_hidden_size % _expert_tensor_ranks(a) != 0,
        "--moe-ffn-hidden-size {moe_ffn_hidden_size} does not divide over "
        "--expert-tensor-parallel-size, which is --tensor-model-parallel-size if it is not given; "
        "use a divisor",
    ),
    Refusal(
        "context-parallel-kind",
        lambda a: a.context_parallel_size > 1 and not set(a.cp_comm_type) <= set(CP_COMM_TYPES),
        "--cp-comm-type: ring attention (p2p) knows no window, and local layers have one; use "
        "all_gather or a2a",
    ),
    Refusal(
        "context-parallel-heads",
        lambda a: "a2a" in a.cp_comm_type and _heads_left(a) % a.context_parallel_size != 0,
        "--cp-comm-type a2a splits the heads that tensor parallelism leaves, and "
        "--num-query-groups {num_query_groups} do not divide over --tensor-model-parallel-size "
        "{tensor_model_parallel_size} x --context-parallel-size {context_parallel_size}; use "
        "--cp-comm-type all_gather",
    ),
    Refusal(
        "context-parallel-length",
        lambda a: a.context_parallel_size > 1 and a.seq_length % (2 * a.context_parallel_size) != 0,
        "--seq-length {seq_length} cannot be cut into two chunks for each rank of "
        "--context-parallel-size {context_parallel_size}; use a multiple of twice that",
    ),
    Refusal(
        "sequence-parallel-length",
        lambda a: (
            a.sequence_parallel
            and a.seq_length % (a.context_parallel_size * a.tensor_model_parallel_size) != 0
        ),
        "--seq-length {seq_length} does not divide over --tensor-model-parallel-size "
        "{tensor_model_parallel_size} x --context-parallel-size {context_parallel_size} under "
        "--sequence-parallel; use a multiple of their product",
    ),
    Refusal(
        "hybrid-context-parallel",
        lambda a: a.hybrid_context_parallel or a.hierarchical_context_parallel_sizes,
        "--hybrid-context-parallel and --hierarchical-context-parallel-sizes split sequences in "
        "ways that Trinity's attention does not know; use --context-parallel-size alone",
    ),
    Refusal(
        "batch-over-ranks",
        lambda a: (
            a.global_batch_size is not None
            and a.global_batch_size % (a.micro_batch_size * _data_ranks(a)) != 0
        ),
        "--global-batch-size {global_batch_size} is no multiple of --micro-batch-size "
        "{micro_batch_size} times the data-parallel ranks; change one of them",
    ),
    Refusal(
        "batch-ramp",
        lambda a: any(
            batch.isdigit() and int(batch) % (a.micro_batch_size * _data_ranks(a)) != 0
            for batch in _ramp_batches(a)
        ),
        "--step-batch-size-schedule {step_batch_size_schedule}: a batch size is no multiple of "
        "--micro-batch-size {micro_batch_size} times the data-parallel ranks; change one of them",
    ),
    *OPTIMIZER_REFUSALS,
    *CHECKPOINT_REFUSALS,
    Refusal(
        "loss-fusion",
        lambda a: a.cross_entropy_loss_fusion,
        "--cross-entropy-loss-fusion would change nothing: Trinity's loss has its own pass over "
        "the logits; leave it out",
    ),
    Refusal(
        "full-validation",
        lambda a: a.full_validation,
        "--full-validation fails in megatron-core 0.19.2 when there is one validation set; use "
        "--eval-iters",
    ),
    Refusal(
        "document-mask",
        lambda a: a.reset_attention_mask,
        "--reset-attention-mask makes a mask of every pair of tokens, which the core attention "
        "does not take; use --dataloader-inter-document-masking",
    ),
    Refusal(
        "document-positions",
        lambda a: a.reset_position_ids,
        "--reset-position-ids would change nothing: RoPE is relative; leave it out, and use "
        "--dataloader-inter-document-masking to keep documents apart",
    ),
    Refusal(
        "sft",
        lambda a: a.sft,
        "--sft packs conversations in a way that Trinity's batches do not know; leave it out",
    ),
    Refusal(
        "attention-mask",
        lambda a: a.create_attention_mask_in_dataloader,
        "the core attention takes no mask tensor; use --no-create-attention-mask-in-dataloader",
    ),
    Refusal(
        "router",
        lambda a: (
            a.moe_router_score_function != "sigmoid"
            or not a.moe_router_enable_expert_bias
            or a.moe_router_load_balancing_type not in ("none", ["none"])
        ),
        "Trinity's router has sigmoid scores, an expert bias and no auxiliary loss of Megatron's; "
        "leave --moe-router-score-function and --moe-router-load-balancing-type at their defaults",
    ),
    Refusal(
        "balancing-rates",
        lambda a: (
            a.moe_router_bias_update_rate <= 0
            or a.smebu_kappa <= 0
            or a.smebu_lambda <= 0
            or not 0 <= a.smebu_beta < 1
        ),
        "--moe-router-bias-update-rate, --smebu-kappa and --smebu-lambda must be above 0 and "
        "--smebu-beta in [0, 1); use --load-balancing none for a bias that does not move",
    ),
    Refusal(
        "balancing-unused",
        lambda a: (
            (a.load_balancing != "sign" and a.moe_router_bias_update_rate != SIGN_DEFAULT)
            or (
                a.load_balancing != "smebu"
                and (a.smebu_kappa, a.smebu_lambda, a.smebu_beta) != SMEBU_DEFAULTS
            )
        ),
        "--load-balancing {load_balancing} would ignore a rate that was given: "
        "--moe-router-bias-update-rate is of the sign rule, --smebu-kappa, --smebu-lambda and "
        "--smebu-beta are of smebu; leave it out or choose that rule",
    ),
    Refusal(
        "loss-weights",
        lambda a: a.seq_aux_loss_coeff < 0 or a.z_loss_coeff < 0 or a.z_loss_start_iteration < 0,
        "--seq-aux-loss-coeff, --z-loss-coeff and --z-loss-start-iteration cannot be negative; "
        "use 0 to leave a loss out",
    ),
    Refusal(
        "alarm-window",
        lambda a: a.alarm_window < 20 or a.alarm_window % 4 != 0,
        "--alarm-window {alarm_window}: use a multiple of 4, 20 or more",
    ),
    Refusal(
        "router-extras",
        lambda a: (
            a.moe_expert_capacity_factor is not None
            or a.moe_z_loss_coeff is not None
            or a.moe_router_num_groups
            or a.moe_router_fusion
            or a.moe_enable_routing_replay
        ),
        "Trinity's router drops no tokens and knows no groups, router z-loss, fusion or replay; "
        "leave out --moe-expert-capacity-factor, --moe-z-loss-coeff, --moe-router-num-groups, "
        "--moe-router-fusion and --moe-enable-routing-replay",
    ),
    Refusal(
        "other-activations",
        lambda a: (
            not a.swiglu
            or a.squared_relu
            or a.quick_geglu
            or a.add_bias_linear
            or a.activation_func_clamp_value is not None
            or a.glu_linear_offset
            or a.moe_apply_probs_on_input
            or a.moe_latent_size is not None
        ),
        "Trinity's MLPs are SwiGLU without biases, and routing weighs their outputs; leave out "
        "--squared-relu, --quick-geglu, --activation-func-clamp-value, --glu-linear-offset, "
        "--moe-apply-probs-on-input and --moe-latent-size",
    ),
    Refusal(
        "recompute-of-others",
        lambda a: (
            a.recompute_granularity == "selective"
            and not {"moe_act", "mla_up_proj", "gdn_norm_out"}.isdisjoint(a.recompute_modules or ())
        ),
        "--recompute-modules moe_act, mla_up_proj and gdn_norm_out are of modules that Trinity's "
        "layers do not have; use core_attn, layernorm, mlp, shared_experts or moe",
    ),
    Refusal(
        "dropout",
        lambda a: a.attention_dropout or a.hidden_dropout,
        "Trinity has no dropout; leave --attention-dropout and --hidden-dropout at 0",
    ),
    Refusal(
        "mup",
        lambda a: a.use_mup,
        "--use-mup also changes softmax scale, init and learning rates; use --mup-enabled, the "
        "embedding scale alone",
    ),
    Refusal(
        "checkpoint-args",
        lambda a: a.use_checkpoint_args,
        "--use-checkpoint-args is not supported; give the preset and flags that the run had",
    ),
    Refusal(
        "other-models",
        lambda a: a.multi_latent_attention or a.mtp_num_layers or a.hybrid_layer_pattern,
        "latent attention, multi-token prediction and hybrid layers are not part of Trinity; leave "
        "out --multi-latent-attention, --mtp-num-layers and --hybrid-layer-pattern",
    ),
)


def validate(args: Namespace) -> None:
    """Refuse arguments that cannot work, before Megatron's own checks.

    Raises:
        UsageError: the first row of the table that applies.
    """
    for refusal in REFUSALS:
        if refusal.applies(args):
            raise UsageError(refusal.message.format(**vars(args)))
