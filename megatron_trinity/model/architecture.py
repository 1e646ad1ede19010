"""What there is to know of the architecture without tensors: its formulas and its choices."""

from __future__ import annotations

CP_COMM_TYPES = ("all_gather", "a2a")

FIXED: dict[str, object] = {
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "apply_query_key_layer_scaling": False,
    "attention_output_gate": True,
    "experimental_attention_variant": None,
    "layernorm_zero_centered_gamma": False,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "sigmoid",
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "qk_l2_norm": False,
    "qk_layernorm": True,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "rotary_seq_len_interpolation_factor": None,
    "softmax_type": "vanilla",
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    "use_rope_scaling": False,
}
"""Megatron's arguments that have one value in every AfMoE model."""
"""Ways of context parallelism: gather keys and values, or exchange sequence against heads."""


def layer_is_global(layer: int, every: int) -> bool:
    """Whether 0-based `layer` is global: full attention, no RoPE. With 4: layers 3, 7, 11, ..."""
    return (layer + 1) % every == 0


def no_rope_pattern(num_layers: int, every: int) -> list[int]:
    """Megatron's `no_rope_freq`: 1 where a layer has no RoPE, which is where it is global."""
    return [int(layer_is_global(layer, every)) for layer in range(num_layers)]


def moe_pattern(num_layers: int, num_dense_layers: int) -> list[int]:
    """Megatron's `moe_layer_freq`: 0 for the dense layers at the start, then 1."""
    return [int(layer >= num_dense_layers) for layer in range(num_layers)]


def initializer_sigma(hidden_size: int) -> float:
    """Standard deviation of the initial weights before truncation, 0.5/sqrt(d) (report, eq. 38)."""
    return 0.5 * float(hidden_size) ** -0.5


def post_norm_gain(num_layers: int) -> float:
    """The initial gain of the sandwich's outer norms, 1/sqrt(L) (report, eq. 35)."""
    return float(num_layers) ** -0.5
