"""What is said at an export of readers that cannot express the model."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_trinity.checkpoint.hf.config import config_json
from megatron_trinity.checkpoint.hf.mapping import Experts
from megatron_trinity.checkpoint.hf.readers import not_expressed
from tests.trinity import afmoe_config


@pytest.mark.parametrize(
    ("changed", "experts", "said"),
    [
        ({}, "per-expert", []),
        ({"global_attn_every_n_layers": 2}, "per-expert", ["llama.cpp takes every 4th"]),
        ({"mup_enabled": False}, "per-expert", ["llama.cpp multiplies the embedding"]),
        ({"num_hidden_layers": 3}, "per-expert", ["mlx-lm does not load"]),
        ({"num_experts_per_tok": 1}, "per-expert", ["mlx-lm does not normalise"]),
        ({}, "fused", ["llama.cpp, mlx-lm and SGLang read experts"]),
        (
            {"global_attn_every_n_layers": 8, "mup_enabled": False},
            "per-expert",
            ["llama.cpp takes", "llama.cpp multiplies", "mlx-lm does not load"],
        ),
    ],
)
def test_each_is_said(changed: dict[str, Any], experts: Experts, said: list[str]) -> None:
    sizes = {"num_hidden_layers": 4, "global_attn_every_n_layers": 4, "num_experts_per_tok": 2}
    found = not_expressed(afmoe_config(**{**sizes, **changed}), experts)
    assert [line[: len(start)] for line, start in zip(found, said, strict=True)] == said
    assert not any("\n" in line for line in found)


READ = {
    "llama.cpp": "head_dim hidden_size intermediate_size max_position_embeddings "
    "moe_intermediate_size num_attention_heads num_dense_layers num_experts num_experts_per_tok "
    "num_hidden_layers num_key_value_heads num_shared_experts rms_norm_eps rope_theta route_norm "
    "route_scale score_func sliding_window vocab_size",
    "mlx-lm": "head_dim hidden_size intermediate_size layer_types max_position_embeddings "
    "model_type moe_intermediate_size mup_enabled n_group num_attention_heads num_dense_layers "
    "num_experts num_experts_per_tok num_hidden_layers num_key_value_heads num_shared_experts "
    "rms_norm_eps rope_parameters rope_scaling rope_theta route_norm route_scale score_func "
    "sliding_window tie_word_embeddings topk_group vocab_size",
    "SGLang": "head_dim hidden_act hidden_size intermediate_size layer_types "
    "max_position_embeddings moe_intermediate_size mup_enabled n_group num_attention_heads "
    "num_dense_layers num_experts num_experts_per_tok num_hidden_layers num_key_value_heads "
    "num_shared_experts pad_token_id rms_norm_eps rope_theta route_norm route_scale score_func "
    "sliding_window topk_group vocab_size",
}
"""Keys of `config.json` that the code of a reader asks for."""


@pytest.mark.parametrize("reader", READ)
def test_the_configuration_has_each_key_that_is_read(reader: str) -> None:
    written = config_json(afmoe_config(), "bfloat16")
    assert {*READ[reader].split()} - written.keys() == set()
