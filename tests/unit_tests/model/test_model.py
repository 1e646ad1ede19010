"""The scale of the embedding, and that nothing else is scaled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.distributed.pool import RankPools
from tests.trinity import afmoe_config, build, parse

LENGTH = 9


def embed(rank: int, world_size: int, enabled: bool, dtype: str) -> dict[str, Tensor]:
    from megatron.core.transformer.module import Float16Module

    flags = ("--bf16",) if dtype == "bf16" else ()
    model = build(parse(afmoe_config(mup_enabled=enabled, hidden_size=48), flags))
    if dtype == "bf16":
        Float16Module(model.config, model)
    ids = torch.arange(LENGTH)[None] * 3
    positions = torch.arange(LENGTH)[None]
    hidden = torch.randn(LENGTH, 1, 48, generator=torch.Generator().manual_seed(1))
    weight = model.output_layer.weight
    return {
        "rows": model.embedding.word_embeddings.weight[ids[0]].detach(),
        "embedded": model.embedding(ids, positions)[:, 0].detach(),
        "logits": model.output_layer(hidden.to(weight.dtype))[0].detach(),
        "expected logits": (hidden.to(weight.dtype) @ weight.T).detach(),
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("enabled", [True, False])
def test_only_the_embedding_is_scaled(ranks: RankPools, enabled: bool, dtype: str) -> None:
    [got] = ranks.run(embed, enabled, dtype, world_size=1)
    factor = 48**0.5 if enabled else 1.0
    assert torch.equal(got["embedded"], got["rows"] * factor)
    torch.testing.assert_close(got["logits"], got["expected logits"])


def two_heads(rank: int, world_size: int) -> tuple[bool, bool]:
    model = build(parse(afmoe_config()))
    embedding, head = model.embedding.word_embeddings.weight, model.output_layer.weight
    return embedding.data_ptr() == head.data_ptr(), torch.equal(embedding, head)


def test_embedding_and_lm_head_are_two_matrices(ranks: RankPools) -> None:
    assert ranks.run(two_heads, world_size=1) == [(False, False)]
