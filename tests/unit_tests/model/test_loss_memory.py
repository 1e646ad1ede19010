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


def held(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Held:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, 1, HIDDEN, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(VOCAB, (TOKENS, 1), generator=generator)
    with LiveBytes() as live:
        with SavedBytes() as saved:
            total = loss(hidden, weight, labels)
        forward = live.peak
        live.peak = live.now
        torch.autograd.grad(total, [hidden, weight])
    return Held(saved.without(hidden, weight), forward, live.peak)


def ours(rank: int, world_size: int, chunk_size: int | None) -> Held:
    import torch.distributed as dist

    from megatron_trinity.model.loss import token_losses

    group = dist.group.WORLD
    assert group is not None

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        values = token_losses(hidden, weight, labels, VOCAB, group, chunk_size=chunk_size)
        return values.cross_entropy.sum() + 0.1 * values.log_sum_exp.square().sum()

    return held(loss)


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
