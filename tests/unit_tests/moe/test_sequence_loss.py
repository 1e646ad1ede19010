"""The sequence-wise loss against the report's sums, and its gradient against plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_trinity.moe.router import sigmoid_topk
from megatron_trinity.moe.sequence_loss import sequence_balance_loss
from tests.distributed.pool import RankPools

TOKENS, SEQUENCES, EXPERTS, TOPK = 12, 3, 6, 2


def example(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """`[s, b, E]` logits, and the choice over scores with a bias that matters."""
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(TOKENS, SEQUENCES, EXPERTS, generator=generator)
    bias = 0.3 * torch.randn(EXPERTS, generator=generator)
    _, chosen = sigmoid_topk(logits.flatten(0, 1), bias, TOPK, 1.0)
    return logits, chosen.view(logits.shape)


def plain(logits: Tensor, chosen: Tensor) -> list[float]:
    """Loops over the report's indices, in fp64."""
    losses = []
    for b in range(logits.shape[1]):
        scores = 1 / (1 + np.exp(-logits[:, b].double().numpy()))
        loss = 0.0
        for i in range(EXPERTS):
            f = EXPERTS / (TOPK * TOKENS) * sum(bool(chosen[t, b, i]) for t in range(TOKENS))
            p = sum(scores[t, i] / scores[t].sum() for t in range(TOKENS)) / TOKENS
            loss += f * p
        losses.append(loss)
    return losses


def test_values() -> None:
    logits, chosen = example()
    got = sequence_balance_loss(logits, chosen, TOPK, None)
    np.testing.assert_allclose(got.numpy(), plain(logits, chosen), rtol=1e-6)


def test_an_even_load_gives_one() -> None:
    chosen = torch.zeros(6, 1, 6, dtype=torch.bool)
    for token in range(6):
        chosen[token, 0, [token, (token + 1) % 6]] = True
    got = sequence_balance_loss(torch.zeros(6, 1, 6), chosen, 2, None)
    assert got.item() == pytest.approx(1.0, rel=1e-6)


def test_gradient() -> None:
    logits, chosen = example()
    [ours] = torch.autograd.grad(
        sequence_balance_loss(logits.requires_grad_(), chosen, TOPK, None).sum(), logits
    )
    scores = torch.sigmoid(logits.double())
    share = EXPERTS / (TOPK * TOKENS) * chosen.double().sum(dim=0)
    mean = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=0)
    [expected] = torch.autograd.grad((share * mean).sum(), logits)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scale", [50.0, 1000.0])
def test_saturated_logits_are_bounded(scale: float) -> None:
    logits, chosen = example(scale)
    logits.requires_grad_()
    losses = sequence_balance_loss(logits, chosen, TOPK, None)
    assert bool((losses > 0).all())
    assert bool((losses <= EXPERTS / TOPK + 1e-4).all())  # all weight on experts that all chose
    losses.sum().backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


def split(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    import torch.distributed as dist

    logits, chosen = example()
    mine = slice(rank * TOKENS // world_size, (rank + 1) * TOKENS // world_size)
    part = logits[mine].clone().requires_grad_()
    losses = sequence_balance_loss(part, chosen[mine], TOPK, dist.group.WORLD)
    losses.sum().backward()
    assert part.grad is not None
    return losses.detach(), part.grad


def test_a_sequence_spread_over_ranks(ranks: RankPools) -> None:
    logits, chosen = example()
    logits.requires_grad_()
    whole = sequence_balance_loss(logits, chosen, TOPK, None)
    whole.sum().backward()
    results = ranks.run(split, world_size=4)
    torch.testing.assert_close(sum(losses for losses, _ in results), whole.detach())
    torch.testing.assert_close(torch.cat([gradient for _, gradient in results]), logits.grad)
