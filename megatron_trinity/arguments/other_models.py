"""What Megatron trains and AfMoE is not."""

from __future__ import annotations

from megatron_trinity.arguments.refusal import Refusal

OTHER_MODEL_REFUSALS: tuple[Refusal, ...] = (
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
        "{--squared-relu}, {--quick-geglu}, {--activation-func-clamp-value}, "
        "{--glu-linear-offset}, {--moe-apply-probs-on-input} and {--moe-latent-size}",
    ),
    Refusal(
        "recompute-of-others",
        lambda a: (
            a.recompute_granularity == "selective"
            and not {"moe_act", "mla_up_proj", "gdn_norm_out"}.isdisjoint(a.recompute_modules or ())
        ),
        "{--recompute-modules} moe_act, mla_up_proj and gdn_norm_out are of modules that "
        "Trinity's layers do not have; use core_attn, layernorm, mlp, shared_experts or moe",
    ),
    Refusal(
        "dropout",
        lambda a: a.attention_dropout or a.hidden_dropout,
        "Trinity has no dropout; leave {--attention-dropout} and {--hidden-dropout} at 0",
    ),
    Refusal(
        "mup",
        lambda a: a.use_mup,
        "{--use-mup} also changes softmax scale, init and learning rates; use {--mup-enabled}, "
        "the embedding scale alone",
    ),
    Refusal(
        "other-models",
        lambda a: a.multi_latent_attention or a.mtp_num_layers or a.hybrid_layer_pattern,
        "latent attention, multi-token prediction and hybrid layers are not part of Trinity; "
        "leave out {--multi-latent-attention}, {--mtp-num-layers} and {--hybrid-layer-pattern}",
    ),
)
