"""The vocabulary-parallel cross entropy and its companions, against closed forms and autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.distributed.pool import RankPools

LENGTH, BATCH, VOCAB = 5, 3, 48
Z_LOSS = 0.03


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
    rank: int, world_size: int, logits: Tensor, labels: Tensor, vocab_size: int, objective: str
) -> dict[str, Any]:
    """Values `[4, s, b]` and the gradient of this rank's part of the logits."""
    import torch.distributed as dist

    from megatron_trinity.model.loss import vocab_parallel_cross_entropy

    assert dist.group.WORLD is not None
    part = logits.chunk(world_size, dim=-1)[rank].clone().requires_grad_()
    # A clone: the function uses up its logits.
    losses = vocab_parallel_cross_entropy(part.clone(), labels, vocab_size, dist.group.WORLD)
    scalar(losses, objective).backward()
    return {
        "values": torch.stack(losses).detach(),
        "gradient": part.grad,
        "needs gradient": [value.requires_grad for value in losses],
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
    return torch.cat([result["gradient"] for result in results], dim=-1)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str
)
@pytest.mark.parametrize("objective", ["cross entropy", "logsumexp", "both", "z-loss"])
def test_values_and_gradients(
    ranks: RankPools, objective: str, dtype: torch.dtype, tolerance: float, world_size: int
) -> None:
    logits, labels = inputs(dtype)
    results = ranks.run(parallel, logits, labels, VOCAB, objective, world_size=world_size)
    for result in results:
        assert result["values"].dtype == dtype
        assert result["needs gradient"] == [True, True, False, False]
        np.testing.assert_allclose(
            result["values"].numpy(), closed_form(logits, labels), rtol=tolerance, atol=tolerance
        )
    got, expected = whole_gradient(results), plain(logits, labels, objective)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("world_size", [1, 2])
def test_bf16_logits_are_computed_with_in_fp32(ranks: RankPools, world_size: int) -> None:
    logits, labels = inputs(torch.bfloat16)
    results = ranks.run(parallel, logits, labels, VOCAB, "both", world_size=world_size)
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
def test_saturated_logits_stay_finite(
    ranks: RankPools, dtype: torch.dtype, world_size: int
) -> None:
    logits, labels = inputs(torch.float64)
    logits = (1e4 * logits.sign()).to(dtype)
    logits[0] = -1e4
    logits[1] = 1e4
    results = ranks.run(parallel, logits, labels, VOCAB, "both", world_size=world_size)
    for result in results:
        np.testing.assert_allclose(
            result["values"].numpy(), closed_form(logits, labels), rtol=1e-6, atol=1e-3
        )
    got = whole_gradient(results)
    torch.testing.assert_close(got, plain(logits.double(), labels, "both").to(dtype))


def both(
    rank: int, world_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Cross entropy of ours and upstream's, and the gradients."""
    import torch.distributed as dist
    from megatron.core import tensor_parallel

    from megatron_trinity.model.loss import vocab_parallel_cross_entropy

    assert dist.group.WORLD is not None
    logits, labels = inputs(dtype)
    ours, upstream = (
        logits.chunk(world_size, dim=-1)[rank].clone().requires_grad_() for _ in range(2)
    )
    got = vocab_parallel_cross_entropy(ours.clone(), labels, VOCAB, dist.group.WORLD).cross_entropy
    expected = tensor_parallel.vocab_parallel_cross_entropy(
        upstream.clone(), labels, tp_group=dist.group.WORLD
    )
    factor, _ = weights(torch.float32)
    (got * factor).sum().backward()
    (expected * factor).sum().backward()
    return got.detach(), expected.detach(), ours.grad, upstream.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_cross_entropy_is_upstreams(ranks: RankPools, dtype: torch.dtype, world_size: int) -> None:
    for got, expected, gradient, expected_gradient in ranks.run(both, dtype, world_size=world_size):
        if world_size <= 2:
            assert torch.equal(got, expected)
        # Gloo adds up more than two ranks in an order that depends on the place in the tensor.
        torch.testing.assert_close(got, expected, rtol=5e-7, atol=0)
        torch.testing.assert_close(gradient, expected_gradient, rtol=None, atol=None)


@pytest.mark.parametrize("padding", [1, 11, 13, 30])
def test_padding_has_no_part_in_anything(ranks: RankPools, padding: int) -> None:
    # Of four ranks of 12 rows, the last has some padding, or nothing else, or it is not alone.
    vocab_size = VOCAB - padding
    logits, labels = inputs(torch.float32)
    logits[..., vocab_size:] += 50
    labels %= vocab_size
    results = ranks.run(parallel, logits, labels, vocab_size, "both", world_size=4)
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


def collectives(rank: int, world_size: int) -> list[tuple[str, tuple[int, ...]]]:
    import torch.distributed as dist

    from megatron_trinity.model.loss import vocab_parallel_cross_entropy

    seen: list[tuple[str, tuple[int, ...]]] = []
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, op: Any, group: Any) -> None:
        seen.append((str(op), tuple(tensor.shape)))
        original(tensor, op, group)

    assert dist.group.WORLD is not None
    logits, labels = inputs(torch.float32)
    part = logits.chunk(world_size, dim=-1)[rank].clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", all_reduce)
        losses = vocab_parallel_cross_entropy(part.clone(), labels, VOCAB, dist.group.WORLD)
        losses.cross_entropy.sum().backward()
    return seen


def test_two_collectives_and_none_of_them_over_the_vocabulary(ranks: RankPools) -> None:
    for seen in ranks.run(collectives, world_size=2):
        assert [shape for _, shape in seen] == [(LENGTH, BATCH, 1), (3, LENGTH, BATCH)]
        assert ["MAX" in seen[0][0], "SUM" in seen[1][0]] == [True, True]


def buffers(rank: int, world_size: int, dtype: torch.dtype) -> list[int]:
    """Sizes of the tensors with a vocabulary axis that forward and backward make."""
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_trinity.model.loss import vocab_parallel_cross_entropy

    class Allocations(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.storages: dict[int, Tensor] = {}

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape and out.shape[-1] == VOCAB:
                self.storages[out.untyped_storage().data_ptr()] = out
            return out

    assert dist.group.WORLD is not None
    logits, labels = inputs(dtype)
    logits.requires_grad_()
    consumed = logits.clone()
    with Allocations() as allocations:
        losses = vocab_parallel_cross_entropy(consumed, labels, VOCAB, dist.group.WORLD)
        total = (losses.cross_entropy + losses.log_sum_exp.square()).sum()
        torch.autograd.grad(total, consumed)
    before = {t.untyped_storage().data_ptr() for t in (logits, consumed)}
    made = [t for pointer, t in allocations.storages.items() if pointer not in before]
    return sorted(t.element_size() for t in made)


def test_one_fp32_buffer_and_the_gradient(ranks: RankPools) -> None:
    # bf16: the fp32 copy and the bf16 gradient. fp32: the logits themselves.
    assert ranks.run(buffers, torch.bfloat16, world_size=1) == [[2, 4]]
    assert ranks.run(buffers, torch.float32, world_size=1) == [[]]


def second_backward(rank: int, world_size: int) -> None:
    import torch.distributed as dist

    from megatron_trinity.model.loss import vocab_parallel_cross_entropy

    assert dist.group.WORLD is not None
    logits, labels = inputs(torch.bfloat16)
    losses = vocab_parallel_cross_entropy(logits.requires_grad_(), labels, VOCAB, dist.group.WORLD)
    losses.cross_entropy.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.cross_entropy.sum().backward()


def test_a_second_backward_pass_is_refused(ranks: RankPools) -> None:
    ranks.run(second_backward, world_size=1)
