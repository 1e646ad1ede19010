"""Whole tensors into a model and out of it, and the names that no layout changes."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from megatron_trinity.model.shards import Shard, model_shards, whole_tensors
from tests.distributed.pool import RankPools
from tests.trinity import afmoe_config, build, load_whole_tensors, parse

EXPERTS = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"


def random_like(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {key: torch.randn(t.shape, generator=generator) for key, t in tensors.items()}


def round_trip(rank: int, world_size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = build(parse(afmoe_config()))
    written = random_like(whole_tensors(model))
    load_whole_tensors(model, written)
    return written, whole_tensors(model)


def test_what_is_loaded_is_read_back(ranks: RankPools) -> None:
    [(written, read)] = ranks.run(round_trip, world_size=1)
    assert written.keys() == read.keys()
    for key, tensor in written.items():
        assert torch.equal(tensor, read[key]), key


def parameters_and_tensors(
    rank: int, world_size: int
) -> tuple[int, dict[str, list[int]], Tensor, Tensor]:
    """Also one expert's fused matrix as the module holds it, to compare its order of rows."""
    model = build(parse(afmoe_config()))
    tensors = random_like(whole_tensors(model))
    load_whole_tensors(model, tensors)
    expert = model.decoder.layers[1].mlp.experts.local_experts[5].linear_fc1.weight
    values = sum(tensor.numel() for tensor in model.state_dict().values() if tensor is not None)
    return values, {k: list(t.shape) for k, t in tensors.items()}, expert, tensors[EXPERTS][5]


def test_every_value_of_a_model_has_a_canonical_place(ranks: RankPools) -> None:
    [(values, shapes, expert, whole)] = ranks.run(parameters_and_tensors, world_size=1)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == values
    assert shapes[EXPERTS] == [8, 96, 64]
    assert shapes["decoder.layers.4.self_attention.linear_qkv.weight"] == [(8 + 4) * 16, 64]
    assert shapes["decoder.layers.1.mlp.router.expert_bias"] == [8]
    assert torch.equal(expert, whole)


def refusals(rank: int, world_size: int) -> tuple[str, str]:
    model = build(parse(afmoe_config()))
    tensors = whole_tensors(model)
    with pytest.raises(ValueError) as wrong_shape:
        load_whole_tensors(model, {**tensors, EXPERTS: tensors[EXPERTS][:, :-1]})
    del tensors[EXPERTS]
    with pytest.raises(KeyError) as missing:
        load_whole_tensors(model, tensors)
    return str(wrong_shape.value), str(missing.value)


def test_what_does_not_fit_is_named(ranks: RankPools) -> None:
    [(wrong_shape, missing)] = ranks.run(refusals, world_size=1)
    assert wrong_shape == f"{EXPERTS}: the model has [8, 96, 64], the source has [8, 95, 64]"
    assert re.search(re.escape(EXPERTS), missing)


def copies(rank: int, world_size: int) -> bool:
    model = build(parse(afmoe_config()))
    tensors = whole_tensors(model)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    with torch.no_grad():
        for shard in model_shards(model):
            shard.data.add_(1)
    assert all(torch.equal(before[key], tensors[key]) for key in before)
    return all(torch.equal(before[key] + 1, t) for key, t in whole_tensors(model).items())


def test_whole_tensors_are_copies_and_shards_are_views(ranks: RankPools) -> None:
    assert ranks.run(copies, world_size=1) == [True]


def test_a_shard_cuts_its_part_out_of_the_whole() -> None:
    whole = torch.arange(3 * 4 * 6).reshape(3, 4, 6)
    part = Shard("w", torch.empty(2, 3), (3, 4, 6), (1, 2, 3), 1)
    assert part.index == (1,)
    assert part.matrix_shape == (4, 6)
    assert torch.equal(part.of(whole[part.index]), whole[1, 2:4, 3:6])
