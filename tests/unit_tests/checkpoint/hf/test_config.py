"""Hugging Face's configuration from arguments and back, exactly, and the keys in its file."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AfmoeConfig

from megatron_trinity.checkpoint.hf.config import (
    config_json,
    flags_from_hf_config,
    hf_config_from_args,
)
from tests.distributed.pool import RankPools
from tests.trinity import afmoe_config, parse

CASES: dict[str, dict[str, Any]] = {
    "small": {},
    "all different": {
        "vocab_size": 999,
        "hidden_size": 80,
        "intermediate_size": 112,
        "moe_intermediate_size": 40,
        "num_hidden_layers": 7,
        "num_dense_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 24,
        "max_position_embeddings": 4096,
        "initializer_range": 0.0123456789,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "num_experts": 10,
        "num_experts_per_tok": 3,
        "num_shared_experts": 2,
        "route_scale": 2.448,
        "global_attn_every_n_layers": 3,
        "sliding_window": 33,
        "mup_enabled": False,
    },
    "top-1 without shared experts": {
        "num_experts_per_tok": 1,
        "num_shared_experts": 0,
        "num_dense_layers": 0,
    },
    "a window of one token": {"sliding_window": 1},
    "no scale": {"route_scale": 1.0},
}


def there_and_back(
    rank: int, world_size: int, overrides: dict[str, Any]
) -> tuple[AfmoeConfig, list[str]]:
    args = parse(afmoe_config(**overrides))
    config = hf_config_from_args(args)
    return config, flags_from_hf_config(config)


@pytest.mark.parametrize("case", CASES)
def test_flags_and_arguments_give_the_configuration_back(ranks: RankPools, case: str) -> None:
    config = afmoe_config(**CASES[case])
    [(back, flags)] = ranks.run(there_and_back, CASES[case], world_size=1)
    assert back.to_dict() == config.to_dict()
    assert flags == flags_from_hf_config(config)


def preset_there_and_back(rank: int, world_size: int, preset: str) -> tuple[Any, Any]:
    from megatron_trinity.arguments.parse import parse_arguments

    def described(args: Any) -> dict[str, Any]:
        names = (
            "vocab_size hidden_size ffn_hidden_size moe_ffn_hidden_size num_layers moe_layer_freq "
            "num_attention_heads num_query_groups kv_channels max_position_embeddings "
            "init_method_std layernorm_epsilon rotary_base num_experts moe_router_topk "
            "num_shared_experts moe_router_topk_scaling_factor no_rope_freq window_size "
            "window_attn_skip_freq mup_enabled moe_shared_expert_intermediate_size"
        )
        return {name: getattr(args, name) for name in names.split()}

    args = parse_arguments(["--preset", preset, "--train-iters", "9000"])
    again = parse(hf_config_from_args(args))
    return described(args), described(again)


@pytest.mark.parametrize("preset", ["tiny", "nano", "mini", "large"])
def test_a_preset_survives_hugging_faces_configuration(ranks: RankPools, preset: str) -> None:
    [(before, after)] = ranks.run(preset_there_and_back, preset, world_size=1)
    assert before == after


def test_the_file_has_todays_keys_and_the_older_ones() -> None:
    config = afmoe_config(sliding_window=7, route_scale=1.5)
    written = config_json(config, "bfloat16")
    expected = {
        # Today's.
        "model_type": "afmoe",
        "architectures": ["AfmoeForCausalLM"],
        "dtype": "bfloat16",
        "sliding_window": 7,
        "route_scale": 1.5,
        "global_attn_every_n_layers": 4,
        "num_dense_layers": 1,
        "mup_enabled": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "layer_types": ["sliding_attention"] * 3 + ["full_attention", "sliding_attention"],
        "tie_word_embeddings": False,
        # What other readers need, and what they get it wrong without.
        "score_func": "sigmoid",
        "route_norm": True,
        "n_group": 1,
        "topk_group": 1,
        "num_expert_groups": 1,
        "num_limited_groups": 1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
    }
    assert {key: written.get(key, "absent") for key in expected} == expected
    assert config.to_dict().keys() <= written.keys()


def test_transformers_reads_the_file_back() -> None:
    config = afmoe_config(num_dense_layers=2, sliding_window=11)
    again = AfmoeConfig.from_dict(config_json(config, "float32"))
    old = {"score_func", "route_norm", "n_group", "topk_group", "rope_theta", "rope_scaling"}
    old |= {"num_expert_groups", "num_limited_groups", "architectures", "dtype"}
    for key, value in config.to_dict().items():
        if key not in old:
            assert again.to_dict()[key] == value, key
