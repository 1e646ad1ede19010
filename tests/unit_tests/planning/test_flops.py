"""FLOPs against matrix products: listed by hand, and counted by torch as a model runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_trinity.planning.flops import (
    DENSE,
    GATE,
    GLOBAL,
    LOCAL,
    PROJECTIONS,
    ROUTED,
    ROUTER,
    SHARED,
    attended_pairs,
    core_attention_flops,
    forward_flops,
    layer_flops,
    layer_parts,
    stage_flops,
    training_flops,
)
from megatron_trinity.planning.parameters import active_parameters
from megatron_trinity.planning.sizes import LayerKind, ModelSizes
from tests.distributed.pool import RankPools
from tests.trinity import afmoe_config, build, parse
from tests.unit_tests.planning.presets import PRESETS

SMALL = ModelSizes(
    num_layers=5,
    num_dense_layers=1,
    global_attn_every_n_layers=4,
    window=7,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    ffn_hidden_size=96,
    num_experts=8,
    topk=2,
    moe_ffn_hidden_size=48,
    num_shared_experts=1,
    vocab_size=160,
)
"""What `tests.trinity.afmoe_config` describes."""


def pairs_of_masks(lengths: list[int], window: int | None) -> int:
    """The true entries of every document's attention mask."""
    total = 0
    for length in lengths:
        query, key = np.indices((length, length))
        mask = key <= query
        if window is not None:
            mask &= key > query - window
        total += int(mask.sum())
    return total


@given(st.lists(st.integers(0, 40), max_size=6), st.none() | st.integers(1, 45))
def test_pairs_are_the_true_entries_of_the_masks(lengths: list[int], window: int | None) -> None:
    assert attended_pairs(lengths, window) == pairs_of_masks(lengths, window)


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_pairs_of_any_kind_of_vector(make: Any) -> None:
    assert attended_pairs(make([3, 9, 1]), 4) == pairs_of_masks([3, 9, 1], 4)


def test_pairs_are_counted_beyond_32_bits() -> None:
    lengths = torch.tensor([1_000_003, 70_001], dtype=torch.int32)
    assert attended_pairs(lengths) == 1_000_003 * 1_000_004 // 2 + 70_001 * 70_002 // 2


def products_of_layer(
    sizes: ModelSizes, kind: LayerKind, tokens: int
) -> list[tuple[int, int, int]]:
    """Every product `[m, k] @ [k, n]` of a layer but those of the core attention, as (m, k, n)."""
    d, heads, groups = sizes.hidden_size, sizes.num_attention_heads, sizes.num_query_groups
    queries, keys = heads * sizes.head_dim, groups * sizes.head_dim
    products = [(tokens, d, n) for n in (queries, queries, keys, keys)]  # q, gate, k, v
    products.append((tokens, queries, d))

    def mlp(rows: int, width: int) -> list[tuple[int, int, int]]:
        return [(rows, d, width), (rows, d, width), (rows, width, d)]

    if not kind.is_moe:
        return products + mlp(tokens, sizes.ffn_hidden_size)
    products.append((tokens, d, sizes.num_experts))
    for _ in range(sizes.topk + sizes.num_shared_experts):
        products += mlp(tokens, sizes.moe_ffn_hidden_size)
    return products


@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("is_moe", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_a_layer_is_the_sum_of_its_products(name: str, is_global: bool, is_moe: bool) -> None:
    sizes, kind, tokens = PRESETS[name].sizes, LayerKind(is_global, is_moe), 4096
    pairs = {False: attended_pairs([tokens], sizes.window), True: attended_pairs([tokens])}
    expected = sum(2 * m * k * n for m, k, n in products_of_layer(sizes, kind, tokens))
    # A logit is a product of two vectors of a head, and so is its share of the weighted values.
    expected += pairs[is_global] * sizes.num_attention_heads * 2 * (2 * sizes.head_dim)
    assert layer_flops(sizes, kind, tokens, pairs[True], pairs[False]) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_parts_of_a_layer(name: str) -> None:
    sizes, tokens = PRESETS[name].sizes, 4096
    d, queries = sizes.hidden_size, sizes.num_attention_heads * sizes.head_dim
    found = layer_parts(sizes, LayerKind(is_global=True, is_moe=True), tokens, 1000, 10)
    expert = 3 * 2 * tokens * d * sizes.moe_ffn_hidden_size
    assert found == {
        PROJECTIONS: 2 * tokens * d * 2 * (queries + sizes.num_query_groups * sizes.head_dim),
        GATE: 2 * tokens * d * queries,
        GLOBAL: 1000 * 2 * 2 * queries,
        ROUTER: 2 * tokens * d * sizes.num_experts,
        ROUTED: sizes.topk * expert,
        SHARED: sizes.num_shared_experts * expert,
    }
    dense = layer_parts(sizes, LayerKind(is_global=False, is_moe=False), tokens, 1000, 10)
    assert dense == {
        PROJECTIONS: found[PROJECTIONS],
        GATE: found[GATE],
        LOCAL: 10 * 2 * 2 * queries,
        DENSE: 3 * 2 * tokens * d * sizes.ffn_hidden_size,
    }


def test_stages_add_up_to_the_model() -> None:
    kinds, batch = SMALL.layer_kinds(), (30, 465, 189)
    assert kinds == [
        LayerKind(is_global=False, is_moe=False),
        LayerKind(is_global=False, is_moe=True),
        LayerKind(is_global=False, is_moe=True),
        LayerKind(is_global=True, is_moe=True),
        LayerKind(is_global=False, is_moe=True),
    ]
    first = stage_flops(SMALL, kinds[:3], False, *batch)
    last = stage_flops(SMALL, kinds[3:], True, *batch)
    assert first + last == forward_flops(SMALL, *batch)
    without_head = stage_flops(SMALL, kinds[3:], False, *batch)
    assert last - without_head == 2 * 30 * 64 * 160
    assert stage_flops(SMALL, [], True, *batch) == 2 * 30 * 64 * 160


def counted_by_torch(rank: int, world_size: int, backward: bool) -> int:
    """FLOPs of all matrix products of a real model, without the core attention's."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build(parse(afmoe_config()))
    ids = torch.arange(2 * 24).reshape(2, 24) % 160
    with FlopCounterMode(display=False) as counter:
        losses = model(ids, torch.arange(24).expand(2, 24), None, labels=ids)
        if backward:
            losses[0].sum().backward()
    products = (torch.ops.aten.mm, torch.ops.aten.addmm)
    return sum(counter.get_flop_counts()["Global"].get(product, 0) for product in products)


def test_a_real_model_multiplies_as_much(ranks: RankPools) -> None:
    assert ModelSizes.from_args(parse(afmoe_config())) == SMALL
    [forward] = ranks.run(counted_by_torch, False, world_size=1)
    [training] = ranks.run(counted_by_torch, True, world_size=1)
    assert forward == forward_flops(SMALL, tokens=48, global_pairs=0, local_pairs=0)
    # RMSNorm sums up its gain's gradient by a product with a vector, which torch counts: over four
    # norms and the heads of queries and keys in each of five layers, and the last norm.
    of_gains = 2 * 48 * (5 * (4 * 64 + (4 + 2) * 16) + 64)
    assert training - of_gains == training_flops(SMALL, tokens=48, global_pairs=0, local_pairs=0)


def test_pairs_go_to_the_layers_that_they_belong_to() -> None:
    none = training_flops(SMALL, 30, 0, 0)
    # 1 of 5 layers is global; forward and backward make three times the forward pass.
    assert training_flops(SMALL, 30, 100, 0) - none == 3 * core_attention_flops(SMALL, 100)
    assert training_flops(SMALL, 30, 0, 100) - none == 3 * 4 * core_attention_flops(SMALL, 100)


@pytest.mark.parametrize("name", PRESETS)
def test_six_times_the_active_parameters(name: str) -> None:
    """Every active matrix costs 6 FLOPs a parameter and token; looking up an embedding, none."""
    sizes = PRESETS[name].sizes
    gains = sizes.num_layers * (4 * sizes.hidden_size + 2 * sizes.head_dim) + sizes.hidden_size
    matrices = active_parameters(sizes) - sizes.vocab_size * sizes.hidden_size - gains
    assert training_flops(sizes, 1000, 0, 0) == 6 * 1000 * matrices
    length = PRESETS[name].seq_length
    pairs = attended_pairs([length]), attended_pairs([length], sizes.window)
    attention = training_flops(sizes, length, *pairs) / (6 * length * matrices) - 1
    # The share on top of it, worked out once from the report's table.
    assert attention == pytest.approx(PRESETS[name].attention_share, abs=5e-4)
