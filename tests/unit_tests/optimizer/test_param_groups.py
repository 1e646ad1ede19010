"""Which group every parameter of a model is in, and what each group is updated with."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_trinity.errors import TrinityError
from megatron_trinity.optimizer import param_groups
from megatron_trinity.optimizer.param_groups import (
    RULES,
    Group,
    Rule,
    group_of,
    groups_from_args,
    summary,
)
from tests.distributed.pool import RankPools
from tests.optimizer import canonical_shapes

LAYER = {
    "input_layernorm.weight": "gains",
    "self_attention.linear_qkv.weight": "attention",
    "self_attention.q_layernorm.weight": "gains",
    "self_attention.k_layernorm.weight": "gains",
    "self_attention.linear_proj.weight": "attention",
    "self_attn_bda.norm.weight": "gains",
    "pre_mlp_layernorm.weight": "gains",
    "mlp_bda.norm.weight": "gains",
}
DENSE = {"mlp.linear_fc1.weight": "dense", "mlp.linear_fc2.weight": "dense"}
MOE = {
    "mlp.router.weight": "router",
    "mlp.shared_experts.linear_fc1.weight": "dense",
    "mlp.shared_experts.linear_fc2.weight": "dense",
    "mlp.experts.experts.linear_fc1.weight": "experts",
    "mlp.experts.experts.linear_fc2.weight": "experts",
}
MODEL = {
    "embedding.word_embeddings.weight": "embedding",
    "decoder.final_layernorm.weight": "gains",
    "output_layer.weight": "output",
}


def arguments(**changes: Any) -> Namespace:
    values = {
        "lr": 8e-4,
        "min_lr": 8e-5,
        "adamw_lr": 2e-4,
        "adamw_min_lr": 2e-5,
        "weight_decay": 0.1,
        "adamw_weight_decay": None,
        "norm_weight_decay": True,
        "router_optimizer": "muon",
    }
    return Namespace(**(values | changes))


def test_every_parameter_of_a_model_is_in_its_group(ranks: RankPools) -> None:
    [shapes] = ranks.run(canonical_shapes, world_size=1)
    expected = dict(MODEL)
    for layer in range(4):
        for name, group in (LAYER | (MOE if layer else DENSE)).items():
            expected[f"decoder.layers.{layer}.{name}"] = group
    assert {key: group_of(key) for key in shapes} == expected


@pytest.mark.parametrize(
    "key",
    [
        "decoder.layers.0.self_attention.linear_qkv.bias",
        "decoder.layers.0.mlp.router.bias",
        "decoder.layers.0.mlp.experts.linear_fc1.weight",
        "output_layer.bias",
        "weight",
    ],
)
def test_an_unknown_parameter_is_an_error(key: str) -> None:
    with pytest.raises(TrinityError, match="is in no group: each parameter has to match one rule"):
        group_of(key)


def test_a_parameter_in_two_groups_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(param_groups, "RULES", (*RULES, Rule("mine", r".*router.*", "adamw")))
    with pytest.raises(TrinityError, match="is in the groups router and mine: each"):
        group_of("decoder.layers.7.mlp.router.weight")


def test_rates_and_decay_by_kind() -> None:
    groups = {group.name: group for group in groups_from_args(arguments())}
    assert list(groups) == [rule.name for rule in RULES]
    assert groups["experts"] == Group("experts", "muon", 8e-4, 8e-5, 0.1)
    assert groups["router"] == Group("router", "muon", 8e-4, 8e-5, 0.1)
    assert groups["output"] == Group("output", "adamw", 2e-4, 2e-5, 0.1)
    assert groups["gains"] == Group("gains", "adamw", 2e-4, 2e-5, 0.1)


def test_flags_change_their_groups_alone() -> None:
    before = groups_from_args(arguments())

    def differing(**changes: Any) -> dict[str, Group]:
        after = groups_from_args(arguments(**changes))
        return {b.name: b for a, b in zip(before, after, strict=True) if a != b}

    assert differing(router_optimizer="adamw") == {
        "router": Group("router", "adamw", 2e-4, 2e-5, 0.1)
    }
    assert differing(norm_weight_decay=False) == {"gains": Group("gains", "adamw", 2e-4, 2e-5, 0.0)}
    decays = differing(adamw_weight_decay=0.02)
    assert {name: group.weight_decay for name, group in decays.items()} == {
        "embedding": 0.02,
        "output": 0.02,
        "gains": 0.02,
    }


def test_the_table_at_start() -> None:
    groups = [Group("experts", "muon", 1e-3, 0.0, 0.1), Group("gains", "adamw", 3e-4, 0.0, 0.0)]
    assert summary(groups, {"experts": [(4, 8), (4, 8), (8, 4)]}) == [
        "> optimizer groups:",
        ">   experts   muon  lr 0.001 to 0, weight decay 0.1: 2 of 4x8, 1 of 8x4",
        ">   gains     adamw lr 0.0003 to 0, weight decay 0: none",
    ]
