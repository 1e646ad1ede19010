"""What is compiled for the logits of a chunk, beside the plain steps of `loss.py`; and counts."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.distributed.pool import RankPools

TOKENS, HIDDEN, VOCAB = 24, 16, 64


def test_the_formulas_are_those_of_the_plain_steps() -> None:
    from megatron_trinity.model.fused_loss import logit_gradient, logit_statistics
    from megatron_trinity.model.loss import exponentials, gradient, statistics

    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(TOKENS, VOCAB, generator=generator)
    target = torch.randint(VOCAB, (TOKENS,), generator=generator)
    factors, *both = torch.randn(3, TOKENS, generator=generator)
    for first in (0, VOCAB // 2, VOCAB, -VOCAB):  # where all targets are, some, and none
        _, expected = statistics(logits.clone(), target, first, torch.float32)
        fused = logit_statistics(logits, target, first)
        torch.testing.assert_close(fused, expected, rtol=1e-6, atol=1e-6)
        here = (target >= first) & (target < first + VOCAB)
        of_target = logits.gather(1, (target - first).clamp(0, VOCAB - 1)[:, None])[:, 0]
        assert torch.equal(expected[2], of_target * here)

        arguments = (factors, torch.stack(both), target, first)
        plain = gradient(exponentials(logits.clone(), expected[0]), *arguments)
        fused = logit_gradient(logits, expected[0], *arguments)
        torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-6)


def losses(
    rank: int, world_size: int, fused: bool, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Values, both gradients and the number of launches, with the kernels of a GPU or not."""
    import torch.distributed as dist

    from megatron_trinity.model import compiling, loss
    from megatron_trinity.planning.costs.operations import OperationCounter, one_launch
    from megatron_trinity.planning.costs.places import Places

    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(TOKENS, 1, HIDDEN, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(VOCAB, (TOKENS, 1), generator=generator)
    assert dist.group.WORLD is not None
    with pytest.MonkeyPatch.context() as patch:
        if fused:
            patch.setattr(compiling, "compiles", lambda tensor: True)
            patch.setattr(compiling, "compiled", lambda f: one_launch(f.__name__, f))
        with OperationCounter(Places("all")) as counter:
            values = loss.token_losses(
                hidden, weight, labels, VOCAB, dist.group.WORLD, chunk_size=chunk_size
            )
            of_log_sum = 0.1 * values[loss.Row.LOG_SUM_EXP].square().sum()
            (values[loss.Row.CROSS_ENTROPY].sum() + of_log_sum).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    values_of_all = values.detach()
    return values_of_all, hidden.grad.float(), weight.grad.float(), counter.launches.total()


@pytest.mark.parametrize("chunk_size", [0, 8])
def test_the_same_losses_in_a_few_launches_a_chunk(ranks: RankPools, chunk_size: int) -> None:
    [(values, *gradients, _)] = ranks.run(losses, True, chunk_size, world_size=1)
    [(expected, *plain, _)] = ranks.run(losses, False, chunk_size, world_size=1)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
    for got, other in zip(gradients, plain, strict=True):
        assert (got - other).norm() < 3e-3 * other.norm()  # bf16


@pytest.mark.parametrize(("fused", "a_chunk"), [(True, 7), (False, 29)])
def test_what_a_chunk_launches(ranks: RankPools, fused: bool, a_chunk: int) -> None:
    counts = [ranks.run(losses, fused, size, world_size=1)[0][-1] for size in (12, 8, 6)]
    assert [more - fewer for fewer, more in pairwise(counts)] == [a_chunk] * 2


@pytest.mark.slow
def test_it_is_compiled_as_one_graph_for_all_sizes() -> None:
    from megatron_trinity.model.compiling import compiled
    from megatron_trinity.model.fused_loss import logit_statistics

    function = compiled(logit_statistics, backend="aot_eager")
    for tokens, width in ((TOKENS, VOCAB), (TOKENS - 5, VOCAB), (TOKENS, VOCAB - 8)):
        logits = torch.randn(tokens, width).bfloat16()
        target = torch.arange(tokens)
        for first in (0, 8, 16):
            expected = logit_statistics(logits, target, first)
            assert torch.equal(function(logits, target, first), expected)
