"""The losses of tokens over a split vocabulary, against closed forms and autograd.

Where a test says what the logits are, the head is the matrix of ones on the diagonal: the hidden
states are the logits, and their gradient is that of the logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.distributed.pool import RankPools

LENGTH, BATCH, VOCAB = 5, 3, 48
HIDDEN = 16
Z_LOSS = 0.03
RAGGED = 4  # tokens of a chunk, which leave three of fifteen for the last


def inputs(dtype: torch.dtype, scale: float = 3.0, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    """Logits `[s, b, v]` and labels `[s, b]`, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    logits = scale * torch.randn(LENGTH, BATCH, vocab, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab, (LENGTH, BATCH), generator=generator)
    return logits.to(dtype), labels


def weights(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A factor for each token's cross entropy and logsumexp, one of them zero."""
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randn(2, LENGTH, BATCH, generator=generator, dtype=torch.float64)
    drawn[:, 0, 0] = 0
    return drawn[0].to(dtype), drawn[1].to(dtype)


def closed_form(logits: Tensor, labels: Tensor, vocab_size: int = VOCAB) -> NDArray[np.float64]:
    """`[4, s, b]` in float64: cross entropy, logsumexp, largest and mean logit."""
    x = logits[..., :vocab_size].double().numpy()
    highest = x.max(-1)
    log_sum_exp = highest + np.log(np.exp(x - highest[..., None]).sum(-1))
    target = np.take_along_axis(x, labels.numpy()[..., None], -1)[..., 0]
    return np.stack([log_sum_exp - target, log_sum_exp, highest, x.mean(-1)])


def parallel(
    rank: int,
    world_size: int,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    objective: str,
    chunk_size: int | None = None,
) -> dict[str, Any]:
    """Values `[4, s, b]` and the gradient of the logits that come from this rank's part."""
    import torch.distributed as dist

    from megatron_trinity.model.loss import token_losses

    assert dist.group.WORLD is not None
    width = logits.size(-1)
    weight = torch.eye(width, dtype=logits.dtype).chunk(world_size)[rank].requires_grad_()
    logits = logits.clone().requires_grad_()
    losses = token_losses(
        logits, weight, labels, vocab_size, dist.group.WORLD, chunk_size=chunk_size
    )
    scalar(losses, objective).backward()
    return {
        "values": losses.detach(),
        "gradient": logits.grad,
    }


def scalar(losses: Any, objective: str) -> Tensor:
    cross_entropy, log_sum_exp = losses[:2]
    of_cross_entropy, of_log_sum_exp = weights(cross_entropy.dtype)
    total = cross_entropy.new_zeros(())
    if objective in ("cross entropy", "both"):
        total = total + (of_cross_entropy * cross_entropy).sum()
    if objective in ("logsumexp", "both"):
        total = total + (of_log_sum_exp * log_sum_exp).sum()
    if objective == "z-loss":
        total = total + (cross_entropy + Z_LOSS * log_sum_exp.square()).mean()
    return total


def plain(logits: Tensor, labels: Tensor, objective: str) -> Tensor:
    """The gradient that torch's own operations give."""
    x = logits.clone().requires_grad_()
    log_sum_exp = torch.logsumexp(x, dim=-1)
    cross_entropy = log_sum_exp - x.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    scalar((cross_entropy, log_sum_exp), objective).backward()
    assert x.grad is not None
    return x.grad


def whole_gradient(results: list[dict[str, Any]]) -> Tensor:
    return torch.stack([result["gradient"] for result in results]).sum(0)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str
)
@pytest.mark.parametrize("objective", ["cross entropy", "logsumexp", "both", "z-loss"])
@pytest.mark.parametrize("chunk_size", [None, RAGGED])
def test_values_and_gradients(
    ranks: RankPools,
    chunk_size: int | None,
    objective: str,
    dtype: torch.dtype,
    tolerance: float,
    world_size: int,
) -> None:
    logits, labels = inputs(dtype)
    arguments = (logits, labels, VOCAB, objective, chunk_size)
    results = ranks.run(parallel, *arguments, world_size=world_size)
    for result in results:
        assert result["values"].dtype == dtype
        np.testing.assert_allclose(
            result["values"].numpy(), closed_form(logits, labels), rtol=tolerance, atol=tolerance
        )
    got, expected = whole_gradient(results), plain(logits, labels, objective)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("chunk_size", [None, RAGGED])
def test_bf16_logits_are_computed_with_in_fp32(
    ranks: RankPools, chunk_size: int | None, world_size: int
) -> None:
    logits, labels = inputs(torch.bfloat16)
    arguments = (logits, labels, VOCAB, "both", chunk_size)
    results = ranks.run(parallel, *arguments, world_size=world_size)
    for result in results:
        assert result["values"].dtype == torch.float32
        np.testing.assert_allclose(
            result["values"].numpy(), closed_form(logits, labels), rtol=1e-6, atol=1e-6
        )
    got = whole_gradient(results)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, plain(logits.float(), labels, "both").bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("chunk_size", [None, RAGGED])
def test_saturated_logits_stay_finite(
    ranks: RankPools, chunk_size: int | None, dtype: torch.dtype, world_size: int
) -> None:
    logits, labels = inputs(torch.float64)
    logits = (1e4 * logits.sign()).to(dtype)
    logits[0] = -1e4
    logits[1] = 1e4
    arguments = (logits, labels, VOCAB, "both", chunk_size)
    results = ranks.run(parallel, *arguments, world_size=world_size)
    for result in results:
        np.testing.assert_allclose(
            result["values"].numpy(), closed_form(logits, labels), rtol=1e-6, atol=1e-3
        )
    got = whole_gradient(results)
    torch.testing.assert_close(got, plain(logits.double(), labels, "both").to(dtype))


def both(
    rank: int, world_size: int, dtype: torch.dtype, chunk_size: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross entropy of ours and upstream's, and the gradients of this rank's logits."""
    import torch.distributed as dist
    from megatron.core import tensor_parallel

    assert dist.group.WORLD is not None
    logits, labels = inputs(dtype)
    ours = parallel(rank, world_size, logits, labels, VOCAB, "cross entropy", chunk_size)
    part = logits.chunk(world_size, dim=-1)[rank].clone().requires_grad_()
    expected = tensor_parallel.vocab_parallel_cross_entropy(
        part.clone(), labels, tp_group=dist.group.WORLD
    )
    factor, _ = weights(torch.float32)
    (expected * factor).sum().backward()
    assert part.grad is not None
    gradient = ours["gradient"].chunk(world_size, dim=-1)[rank]
    return ours["values"][0], expected.detach(), gradient, part.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("chunk_size", [None, RAGGED])
def test_cross_entropy_is_upstreams(
    ranks: RankPools, chunk_size: int | None, dtype: torch.dtype, world_size: int
) -> None:
    results = ranks.run(both, dtype, chunk_size, world_size=world_size)
    for got, expected, gradient, expected_gradient in results:
        if world_size == 1:
            assert torch.equal(got, expected)
        # Each rank's sums are over its own largest logit until they are put together.
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, expected_gradient, rtol=None, atol=None)


@pytest.mark.parametrize("padding", [1, 11, 13, 30])
@pytest.mark.parametrize("chunk_size", [None, RAGGED])
def test_padding_has_no_part_in_anything(
    ranks: RankPools, chunk_size: int | None, padding: int
) -> None:
    # Of four ranks of 12 rows, the last has some padding, or nothing else, or it is not alone.
    vocab_size = VOCAB - padding
    logits, labels = inputs(torch.float32)
    logits[..., vocab_size:] += 50
    labels %= vocab_size
    results = ranks.run(parallel, logits, labels, vocab_size, "both", chunk_size, world_size=4)
    for result in results:
        np.testing.assert_allclose(
            result["values"].numpy(),
            closed_form(logits, labels, vocab_size),
            rtol=1e-6,
            atol=1e-6,
        )
    true = plain(logits[..., :vocab_size], labels, "both")
    gradient = torch.nn.functional.pad(true, (0, padding))
    torch.testing.assert_close(whole_gradient(results), gradient)


def collectives(
    rank: int, world_size: int, chunk_size: int | None
) -> list[tuple[str, tuple[int, ...]]]:
    import torch.distributed as dist

    seen: list[tuple[str, tuple[int, ...]]] = []
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, op: Any, group: Any) -> None:
        seen.append((str(op), tuple(tensor.shape)))
        original(tensor, op, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", all_reduce)
        parallel(rank, world_size, *inputs(torch.float32), VOCAB, "both", chunk_size)
    return seen


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_two_collectives_and_none_of_them_over_the_vocabulary(
    ranks: RankPools, chunk_size: int | None
) -> None:
    tokens = LENGTH * BATCH
    for seen in ranks.run(collectives, chunk_size, world_size=2):
        assert [shape for _, shape in seen] == [(tokens,), (3, tokens)]
        assert ["MAX" in seen[0][0], "SUM" in seen[1][0]] == [True, True]


def head_and_loss(
    rank: int, world_size: int, dtype: torch.dtype, vocab_size: int, chunk_size: int | None
) -> list[Tensor]:
    """Values `[4, s, b]`, and this rank's part of the gradients of hidden states and weight."""
    import torch.distributed as dist

    from megatron_trinity.model.loss import token_losses

    assert dist.group.WORLD is not None
    hidden, whole, labels = head_inputs(dtype, vocab_size)
    weight = whole.chunk(world_size)[rank].clone().requires_grad_()
    losses = token_losses(
        hidden.requires_grad_(),
        weight,
        labels,
        vocab_size,
        dist.group.WORLD,
        chunk_size=chunk_size,
    )
    gradients = torch.autograd.grad(scalar(losses, "both"), [hidden, weight])
    return [losses.detach(), *gradients]


def head_inputs(dtype: torch.dtype, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states `[s, b, h]`, the head `[v, h]` and labels `[s, b]`."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(LENGTH, BATCH, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab_size, (LENGTH, BATCH), generator=generator)
    return hidden.to(dtype), weight.to(dtype), labels


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("vocab_size", [VOCAB, 41])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_size", [0, 1, RAGGED, 14, 100])
def test_head_and_loss_are_those_of_whole_logits(
    ranks: RankPools, chunk_size: int, dtype: torch.dtype, vocab_size: int, world_size: int
) -> None:
    hidden, weight, labels = head_inputs(dtype, vocab_size)
    results = ranks.run(head_and_loss, dtype, vocab_size, chunk_size, world_size=world_size)

    # As a plain linear layer computes it: logits of the hidden states' dtype, which bf16 rounds.
    if dtype == torch.float32:
        hidden, weight = hidden.double(), weight.double()
    hidden.requires_grad_(), weight.requires_grad_()
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    true = logits[..., :vocab_size]
    log_sum_exp = true.logsumexp(-1)
    cross_entropy = log_sum_exp - true.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    total = scalar((cross_entropy, log_sum_exp), "both")
    gradients = torch.autograd.grad(total, [hidden, weight])

    got = [torch.stack([r[1].double() for r in results]).sum(0), torch.cat([r[2] for r in results])]
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    for mine, expected in zip(got, gradients, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(mine.double(), expected.double(), rtol=0, atol=tolerance * scale)
    for result in results:
        np.testing.assert_allclose(
            result[0].numpy(),
            closed_form(logits.detach(), labels, vocab_size),
            rtol=max(1e-6 * (dtype != torch.float64), 1e-14),
            atol=max(2e-6 * (dtype != torch.float64), 1e-14),
        )


def second_backward(rank: int, world_size: int) -> None:
    import torch.distributed as dist

    from megatron_trinity.model.loss import Row, token_losses

    assert dist.group.WORLD is not None
    hidden, weight, labels = head_inputs(torch.bfloat16, VOCAB)
    losses = token_losses(hidden, weight.requires_grad_(), labels, VOCAB, dist.group.WORLD)
    cross_entropy = losses[Row.CROSS_ENTROPY].sum()
    cross_entropy.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy.backward()


def test_a_second_backward_pass_over_kept_logits_is_refused(ranks: RankPools) -> None:
    ranks.run(second_backward, world_size=1)


def test_how_long_a_chunk_is() -> None:
    from megatron_trinity.model.loss import blocks, chunk_length

    assert chunk_length(8192, 200192, None) == 683  # a twelfth; 742 would fit
    assert chunk_length(8192, 200192, None, 4) == 1024  # an eighth; 1112 would fit
    assert chunk_length(8192, 200192 // 8, None) == 4096
    assert chunk_length(2048, 8192, None) == 2048
    assert chunk_length(100, 2**28, None) == 1
    assert [chunk_length(100, 50, size) for size in (0, 1, 99, 100, 101)] == [100, 1, 99, 100, 100]
    assert blocks(41, 3) == [slice(0, 16), slice(16, 32), slice(32, 41)]
    assert blocks(3, 5) == [slice(0, 3)]
    assert blocks(41, 1) == [slice(0, 41)]
    assert blocks(0, 3) == []
