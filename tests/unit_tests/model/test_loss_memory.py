"""What the head and the loss hold: counted bytes, beside those of logits that are held whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.distributed.pool import RankPools
from tests.live_bytes import LiveBytes, SavedBytes

TOKENS, HIDDEN, VOCAB, CHUNK = 512, 16, 4096, 32
BF16, FP32 = 2, 4
# That of the weight, and that of the hidden states, which is added up in fp32.
GRADIENTS = VOCAB * HIDDEN * BF16 + TOKENS * HIDDEN * FP32


class Held(NamedTuple):
    """Bytes beside hidden states and weight: kept for the backward pass, and the two peaks."""

    kept: int
    forward: int
    backward: int


def held(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    tokens: int = TOKENS,
    hidden_size: int = HIDDEN,
    vocab: int = VOCAB,
    device: str = "cpu",
) -> Held:
    hidden = torch.ones(tokens, 1, hidden_size, dtype=torch.bfloat16, device=device)
    weight = torch.ones(vocab, hidden_size, dtype=torch.bfloat16, device=device)
    labels = torch.ones(tokens, 1, dtype=torch.int64, device=device)
    hidden.requires_grad_()
    weight.requires_grad_()
    with LiveBytes() as live:
        with SavedBytes() as saved:
            total = loss(hidden, weight, labels)
        forward = live.peak
        live.peak = live.now
        torch.autograd.grad(total, [hidden, weight])
    return Held(saved.without(hidden, weight), forward, live.peak)


def ours(rank: int, world_size: int, chunk_size: int | None) -> Held:
    import torch.distributed as dist

    from megatron_trinity.model.loss import Row, token_losses

    group = dist.group.WORLD
    assert group is not None

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        values = token_losses(hidden, weight, labels, VOCAB, group, chunk_size=chunk_size)
        return values[Row.CROSS_ENTROPY].sum() + 0.1 * values[Row.LOG_SUM_EXP].square().sum()

    return held(loss)


def of_large(rank: int, world_size: int, tensor_parallel: int) -> Held:
    """A micro-batch of `large`, on a device without values; its ranks exchange nothing."""
    from types import SimpleNamespace

    import torch.distributed as dist

    from megatron_trinity.model.loss import Row, token_losses

    group: Any = SimpleNamespace(rank=lambda: 0, size=lambda: tensor_parallel)

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return token_losses(hidden, weight, labels, 200_192, group)[Row.CROSS_ENTROPY].sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda *_: None)
        return held(loss, 8192, 3072, 200_192 // tensor_parallel, device="meta")


def whole_logits(rank: int, world_size: int) -> Held:
    """Megatron's linear layer and its own cross entropy, which keeps one fp32 copy."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = hidden @ weight.t()
        result: Any = vocab_parallel_cross_entropy(logits, labels, tp_group=dist.group.WORLD)
        return result.sum()

    return held(loss)


def test_held_are_the_logits_of_a_chunk_and_never_those_of_all_tokens(ranks: RankPools) -> None:
    [got] = ranks.run(ours, CHUNK, world_size=1)
    logits = CHUNK * VOCAB * (BF16 + FP32)
    a_token = 100  # bytes of everything that has no vocabulary axis, beside the hidden states
    assert got.kept <= TOKENS * a_token
    assert logits <= got.forward <= logits + TOKENS * a_token
    assert logits + GRADIENTS <= got.backward <= logits + GRADIENTS + TOKENS * a_token

    [plain] = ranks.run(whole_logits, world_size=1)
    whole = TOKENS * VOCAB
    assert plain.kept >= whole * FP32
    assert min(plain.forward, plain.backward) >= whole * (BF16 + FP32)
    # 16 chunks.
    assert plain.forward > 12 * got.forward
    assert plain.backward > 10 * got.backward


@pytest.mark.parametrize("chunk_size", [None, 0, TOKENS])
def test_one_chunk_keeps_its_fp32_logits(ranks: RankPools, chunk_size: int | None) -> None:
    [got] = ranks.run(ours, chunk_size, world_size=1)
    whole = TOKENS * VOCAB
    assert whole * FP32 <= got.kept <= whole * FP32 + TOKENS * 100
    assert got.forward <= whole * (BF16 + FP32) + TOKENS * 100
    assert got.backward <= whole * (BF16 + FP32) + GRADIENTS + TOKENS * 100


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_large_holds_less_than_a_gigabyte(ranks: RankPools, tensor_parallel: int) -> None:
    # Beside weight, hidden states and the weight's gradient; whole logits are 13.1 GB in bf16.
    [got] = ranks.run(of_large, tensor_parallel, world_size=1)
    of_weight = 200_192 // tensor_parallel * 3072 * BF16
    assert got.kept < 0.5e6
    assert 0.8e9 < got.forward < 0.892e9
    assert 0.8e9 < got.backward - of_weight < 0.98e9
