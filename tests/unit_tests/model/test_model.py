"""The scale of the embedding, that nothing else is scaled, and what the model gives for a loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_trinity.model.loss import Row
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


def losses(
    rank: int, world_size: int, dtype: str, true_vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[b, s, v]` (none of them used up), labels, and the output `[4, b, s]` for them."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from megatron.core.transformer.module import Float16Module

    flags = ["--tensor-model-parallel-size", str(world_size)]
    flags += ["--sequence-parallel"] * (world_size > 1) + ["--bf16"] * (dtype == "bf16")
    model = build(parse(afmoe_config(), flags))
    if true_vocab_size is not None:
        model.true_vocab_size = true_vocab_size
    wrapped = Float16Module(model.config, model) if dtype == "bf16" else model
    generator = torch.Generator().manual_seed(3)
    ids, labels = torch.randint(100, (2, 2, LENGTH + 1), generator=generator)
    positions = torch.arange(LENGTH + 1).expand_as(ids)
    with torch.no_grad():
        logits = gather_from_tensor_model_parallel_region(wrapped(ids, positions, None))
    return logits, labels, wrapped(ids, positions, None, labels=labels).detach()


@pytest.mark.parametrize("true_vocab_size", [None, 150])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_output_has_what_a_loss_is_made_of(
    ranks: RankPools, world_size: int, dtype: str, true_vocab_size: int | None
) -> None:
    for logits, labels, output in ranks.run(losses, dtype, true_vocab_size, world_size=world_size):
        assert output.dtype == torch.float32
        assert output.shape == (len(Row), *labels.shape)
        x = logits[..., :true_vocab_size].double()
        expected = {
            Row.CROSS_ENTROPY: cross_entropy(x.mT, labels, reduction="none"),
            Row.LOG_SUM_EXP: x.logsumexp(-1),
            Row.LARGEST_LOGIT: x.amax(-1),
            Row.MEAN_LOGIT: x.mean(-1),
        }
        for row, values in expected.items():
            torch.testing.assert_close(output[row].double(), values, rtol=1e-6, atol=1e-6)
