"""The table between Hugging Face's tensors and ours: a bijection, bit by bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AfmoeConfig, AfmoeForCausalLM

from megatron_trinity.checkpoint.conversion.rows import Piece
from megatron_trinity.checkpoint.hf.mapping import LM_HEAD, Experts, entries, prove_bijection, to_hf
from megatron_trinity.errors import TrinityError
from megatron_trinity.model.shards import whole_tensors
from tests.afmoe import to_trinity
from tests.distributed.pool import RankPools
from tests.trinity import afmoe_config, build, parse

CONFIGS: dict[str, dict[str, Any]] = {
    "small": {},
    "no dense layer": {"num_dense_layers": 0},
    "one MoE layer": {"num_dense_layers": 4},
    "no shared expert": {"num_shared_experts": 0},
    "two shared experts": {"num_shared_experts": 2},
    "one KV head": {"num_key_value_heads": 1},
    "a KV head for every query head": {"num_key_value_heads": 4},
    "heads wider than the model": {"num_attention_heads": 6, "head_dim": 32},
    "one expert": {"num_experts": 1, "num_experts_per_tok": 1},
    "twelve experts": {"num_experts": 12},
}


def fused(config: AfmoeConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """transformers' own state dict, every value random."""
    generator = torch.Generator().manual_seed(9)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(dtype)
        for name, tensor in AfmoeForCausalLM(config).state_dict().items()
        if tensor.numel()
    }


def per_expert(state: dict[str, Tensor], config: AfmoeConfig) -> dict[str, Tensor]:
    """The form of the Hub: three matrices for each expert."""
    width = config.moe_intermediate_size
    result = {}
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            for expert in range(config.num_experts):
                prefix = name.replace("gate_up_proj", f"{expert}.")
                result[prefix + "gate_proj.weight"] = tensor[expert, :width]
                result[prefix + "up_proj.weight"] = tensor[expert, width:]
        elif name.endswith("experts.down_proj"):
            for expert in range(config.num_experts):
                result[name.replace("down_proj", f"{expert}.down_proj.weight")] = tensor[expert]
        else:
            result[name] = tensor
    return result


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("case", CONFIGS)
def test_every_name_of_transformers_is_used_once(case: str) -> None:
    config = afmoe_config(**CONFIGS[case])
    names = [name for entry in entries(config) for name in entry.hf]
    assert len(set(names)) == len(names)
    assert set(names) == per_expert(fused(config), config).keys()
    ours = [entry.trinity for entry in entries(config)]
    assert len(set(ours)) == len(ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CONFIGS)
def test_there_and_back_is_the_same_bit_by_bit(case: str, dtype: torch.dtype) -> None:
    config = afmoe_config(**CONFIGS[case])
    hf = per_expert(fused(config, dtype), config)
    ours = to_trinity(hf, config)
    assert equal(to_hf(ours, config), hf)
    assert equal(to_trinity(to_hf(ours, config), config), ours)
    assert sum(t.numel() for t in ours.values()) == sum(t.numel() for t in hf.values())


@pytest.mark.parametrize("case", CONFIGS)
def test_fused_experts_are_the_same_as_single_ones(case: str) -> None:
    config = afmoe_config(**CONFIGS[case])
    state = fused(config)
    assert equal(to_trinity(state, config), to_trinity(per_expert(state, config), config))


def names_and_shapes(rank: int, world_size: int, overrides: dict[str, Any]) -> dict[str, Any]:
    model = build(parse(afmoe_config(**overrides)))
    return {name: tuple(tensor.shape) for name, tensor in whole_tensors(model).items()}


@pytest.mark.parametrize("case", CONFIGS)
def test_our_side_is_every_tensor_of_our_model(ranks: RankPools, case: str) -> None:
    config = afmoe_config(**CONFIGS[case])
    converted = to_trinity(fused(config), config)
    [model] = ranks.run(names_and_shapes, CONFIGS[case], world_size=1)
    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == model


@settings(max_examples=25)
@given(groups=st.integers(1, 3), ratio=st.integers(1, 3), head_dim=st.sampled_from([2, 4]))
def test_qkv_is_interleaved_by_query_group(groups: int, ratio: int, head_dim: int) -> None:
    heads, hidden = groups * ratio, 3
    config = afmoe_config(
        num_attention_heads=heads, num_key_value_heads=groups, head_dim=head_dim, hidden_size=hidden
    )
    generator = torch.Generator().manual_seed(1)
    query, gate, key, value = (
        torch.randn(n * head_dim, hidden, generator=generator)
        for n in (heads, heads, groups, groups)
    )
    rows = []
    for group in range(groups):
        for matrix in (query, gate):
            for head in range(group * ratio, (group + 1) * ratio):
                rows += [matrix[head * head_dim + i] for i in range(head_dim)]
        for matrix in (key, value):
            rows += [matrix[group * head_dim + i] for i in range(head_dim)]
    names = [f"model.layers.0.self_attn.{n}_proj.weight" for n in ("q", "gate", "k", "v")]
    hf = per_expert(fused(config), config) | dict(
        zip(names, (query, gate, key, value), strict=True)
    )
    joined = to_trinity(hf, config)
    assert torch.equal(
        joined["decoder.layers.0.self_attention.linear_qkv.weight"], torch.stack(rows)
    )
    back = to_hf(joined, config)
    assert all(torch.equal(back[name], hf[name]) for name in names)


def test_gate_stands_before_up_in_every_mlp() -> None:
    config = afmoe_config()
    hf = per_expert(fused(config), config)
    ours = to_trinity(hf, config)
    for trinity, prefix in (
        ("decoder.layers.0.mlp.linear_fc1.weight", "model.layers.0.mlp."),
        (
            "decoder.layers.2.mlp.shared_experts.linear_fc1.weight",
            "model.layers.2.mlp.shared_experts.",
        ),
    ):
        rows = [hf[prefix + "gate_proj.weight"], hf[prefix + "up_proj.weight"]]
        assert torch.equal(ours[trinity], torch.cat(rows))
    experts = ours["decoder.layers.2.mlp.experts.experts.linear_fc1.weight"]
    down = ours["decoder.layers.2.mlp.experts.experts.linear_fc2.weight"]
    for expert in range(config.num_experts):
        prefix = f"model.layers.2.mlp.experts.{expert}."
        width = config.moe_intermediate_size
        assert torch.equal(experts[expert, :width], hf[prefix + "gate_proj.weight"])
        assert torch.equal(experts[expert, width:], hf[prefix + "up_proj.weight"])
        assert torch.equal(down[expert], hf[prefix + "down_proj.weight"])


def test_rows_beyond_the_vocabulary_are_dropped() -> None:
    config = afmoe_config(vocab_size=150)
    hf = per_expert(fused(config), config)
    padded = to_trinity(hf, config)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        padded[name] = torch.cat([padded[name], torch.full((106, 64), torch.nan)])
    assert equal(to_hf(padded, config), hf)


def test_only_the_vocabulary_is_cut() -> None:
    """A matrix of another shape is refused, and a vocabulary with too few rows."""
    config = afmoe_config()
    ours = to_trinity(fused(config), config)
    for name, rows in (("decoder.layers.2.self_attention.linear_qkv.weight", 192), (LM_HEAD, 160)):
        wrong = dict(ours)
        wrong[name] = ours[name][:-1]
        with pytest.raises(TrinityError) as refused:
            to_hf(wrong, config)
        assert str(refused.value) == (
            f"{name} has the shape [{rows - 1}, 64], and not [{rows}, 64]"
        )


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.3.up_proj.weight",
        "model.layers.1.mlp.expert_bias",
        "model.layers.4.self_attn.gate_proj.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_hugging_face_tensor_is_named(name: str) -> None:
    config = afmoe_config()
    hf = per_expert(fused(config), config)
    del hf[name]
    with pytest.raises(TrinityError, match=rf"^{name} is missing, which \S+ is made of$"):
        to_trinity(hf, config)


def test_left_over_hugging_face_tensors_are_named() -> None:
    config = afmoe_config()
    hf = per_expert(fused(config), config)
    extra = {
        "model.layers.5.mlp.expert_bias": torch.zeros(8),
        "model.layers.1.mlp.experts.8.up_proj.weight": torch.zeros(48, 64),
    }
    with pytest.raises(TrinityError) as wrong:
        to_trinity({**hf, **extra}, config)
    assert str(wrong.value) == f"no rule takes {', '.join(sorted(extra))}"


def test_fused_experts_of_another_number_are_refused() -> None:
    config = afmoe_config()
    state = fused(config)
    name = "model.layers.1.mlp.experts.down_proj"
    for number in (7, 9):
        stack = torch.cat([state[name], state[name]])[:number]
        with pytest.raises(TrinityError, match=rf"^{name} has the shape \[{number}, 64, 48\], "):
            to_trinity({**state, name: stack}, config)


def test_many_left_over_tensors_are_counted() -> None:
    config = afmoe_config()
    extra = {f"extra.{number}": torch.zeros(1) for number in range(7)}
    with pytest.raises(TrinityError) as wrong:
        to_trinity({**fused(config), **extra}, config)
    assert str(wrong.value) == (
        "no rule takes extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more"
    )


@pytest.mark.parametrize("experts", ["per-expert", "fused"])
@pytest.mark.parametrize("case", CONFIGS)
def test_the_table_is_proved_a_bijection(case: str, experts: Experts) -> None:
    prove_bijection(entries(afmoe_config(**CONFIGS[case]), experts))


def test_a_table_that_loses_or_repeats_rows_is_found_out() -> None:
    table = list(entries(afmoe_config()))
    number = next(n for n, entry in enumerate(table) if "linear_qkv" in entry.trinity)
    entry = table[number]
    query = entry.pieces[0]

    def message(pieces: list[Piece]) -> str:
        broken = replace(entry, pieces=tuple(pieces))
        with pytest.raises(TrinityError) as wrong:
            prove_bijection([*table[:number], broken, *table[number + 1 :]])
        return str(wrong.value)

    rest = list(entry.pieces[1:])
    assert message(rest).startswith("the mapping has row 0 of ")
    assert message([query, query, *rest]).startswith("the mapping has row 0 of ")
    assert message([*entry.pieces[:-1]]) == (f"the mapping has 176 rows of {entry.trinity}, of 192")
    with pytest.raises(TrinityError, match="twice"):
        prove_bijection([*table, table[0]])


def test_what_our_side_lacks_or_has_too_much_is_named() -> None:
    config = afmoe_config()
    ours = to_trinity(fused(config), config)
    name = "decoder.layers.3.mlp.router.expert_bias"
    lacking = {key: tensor for key, tensor in ours.items() if key != name}
    with pytest.raises(TrinityError) as missing:
        to_hf(lacking, config)
    assert str(missing.value) == (
        f"{name} is missing, which model.layers.3.mlp.expert_bias comes from"
    )
    with pytest.raises(TrinityError, match=r"^no rule takes decoder\.layers\.9\.x$"):
        to_hf({**ours, "decoder.layers.9.x": torch.zeros(1)}, config)
