"""Documents that share a sequence are to the model what they are alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.pool import RankPools
from tests.trainer import FULL_RECOMPUTE
from tests.trinity import afmoe_config, build, parse

LENGTH = 32
# Two micro-batches of two sequences each: documents of one token, of a whole sequence, and between.
MICRO_BATCHES = ([[1, 30, 1], [32]], [[9, 16, 7], [3, 2, 1, 26]])
RECOMPUTE: dict[str, tuple[str, ...]] = {
    "none": (),
    "full": FULL_RECOMPUTE,
    "experts": ("--recompute-granularity", "selective", "--recompute-modules", "moe"),
    "attention and norms": (
        *("--recompute-granularity", "selective"),
        *("--recompute-modules", "core_attn", "layernorm"),
    ),
}


def gradients(model: Any) -> dict[str, Tensor]:
    found = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return found


def together_and_alone(
    rank: int, world_size: int, flags: tuple[str, ...]
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Losses by token of both, and gradients of their sums with the sequence-wise loss in them."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_trinity.model.documents import Documents

    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # as Megatron does at its start
    args = parse(afmoe_config(num_hidden_layers=4), ("--seq-aux-loss-coeff", "0.05", *flags))
    model = build(args).train()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():  # so that the sequence-wise loss is of some weight
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    batches = [torch.randint(160, (2, LENGTH), generator=generator) for _ in MICRO_BATCHES]

    def losses(tokens: Tensor, documents: Documents | None) -> Tensor:
        out: Tensor = model(
            tokens,
            torch.arange(tokens.shape[1]).expand_as(tokens),
            None,
            labels=(tokens * 7) % 160,
            loss_mask=torch.ones(tokens.shape),
            packed_seq_params=documents,
        )[0]
        return out

    # Both forward passes come first, as in a pipeline.
    together = []
    for tokens, rows in zip(batches, MICRO_BATCHES, strict=True):
        ends = [[0, *torch.tensor(row).cumsum(0).tolist()] for row in rows]
        cu_seqlens = torch.tensor([row + [LENGTH] * (6 - len(row)) for row in ends])
        together.append(losses(tokens, Documents.from_cu_seqlens(cu_seqlens, LENGTH)))
    for loss in together:
        loss.sum().backward()
    in_one = gradients(model)

    alone = []
    for tokens, rows in zip(batches, MICRO_BATCHES, strict=True):
        parts = []
        for row, lengths in zip(tokens, rows, strict=True):
            for document in row.split(lengths):
                loss = losses(document.unsqueeze(0), None)
                loss.sum().backward()
                parts.append(loss.detach().flatten())
        alone.append(torch.cat(parts).view(2, LENGTH))
    return [loss.detach() for loss in together], alone, in_one, gradients(model)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_documents_are_as_if_alone(ranks: RankPools, recompute: str) -> None:
    [result] = ranks.run(together_and_alone, RECOMPUTE[recompute], world_size=1)
    together, alone, in_one, by_one = result
    for got, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert in_one.keys() == by_one.keys()
    assert any("router" in name for name in in_one)
    for name, gradient in in_one.items():
        assert (gradient - by_one[name]).norm() <= 1e-5 * by_one[name].norm(), name


# Rows with room behind their documents, each of another size.
PADDED = [[9, 16], [3, 2, 1, 20]]


def padded_and_cut(
    rank: int, world_size: int, flags: tuple[str, ...]
) -> list[tuple[dict[str, Tensor], list[list[int]], list[float]]]:
    """Gradients, counts and sequence-wise losses of layers.

    Of a micro-batch of rows with padding, of the rows without it one by one, and of the first again
    where nobody is told of the padding.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_trinity.model.documents import Documents
    from megatron_trinity.training.balance import routers

    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    model = build(parse(afmoe_config(num_hidden_layers=4), flags)).train()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    tokens = torch.randint(160, (2, LENGTH), generator=generator)
    for row, lengths in zip(tokens, PADDED, strict=True):
        row[sum(lengths) :] = 0

    def backward(tokens: Tensor, rows: list[list[int]], padded: bool) -> None:
        size = tokens.shape[1]
        ends = [[0, *torch.tensor(row).cumsum(0).tolist()] for row in rows]
        cumulative = torch.tensor([row + [row[-1]] * (6 - len(row)) for row in ends])
        losses = model(
            tokens,
            torch.arange(size).expand_as(tokens),
            None,
            labels=(tokens * 7) % 160,
            loss_mask=None,
            packed_seq_params=Documents.from_cu_seqlens(cumulative, size, padded),
        )[0]
        real = torch.arange(size) < cumulative[:, -1:]
        (losses * real).sum().backward()

    def answer() -> tuple[dict[str, Tensor], list[list[int]], list[float]]:
        of_layers = routers([model])
        return (
            gradients(model),
            [router.take_counts().tolist() for router in of_layers],
            [router.take_sequence_loss().item() for router in of_layers],
        )

    backward(tokens, PADDED, padded=True)
    together = answer()
    for row, lengths in zip(tokens, PADDED, strict=True):
        backward(row[None, : sum(lengths)], [lengths], padded=False)
    cut = answer()
    backward(tokens, PADDED, padded=False)
    return [together, cut, answer()]


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("coefficient", ["0", "0.05"])
def test_padding_is_no_token(ranks: RankPools, recompute: str, coefficient: str) -> None:
    flags = ("--seq-aux-loss-coeff", coefficient, *RECOMPUTE[recompute])
    [(together, cut, untold)] = ranks.run(padded_and_cut, flags, world_size=1)
    for name, gradient in together[0].items():
        assert (gradient - cut[0][name]).norm() <= 1e-5 * cut[0][name].norm(), name
    assert together[0].keys() == cut[0].keys()
    assert together[1] == cut[1] != untold[1]
    assert together[2] == pytest.approx(cut[2], rel=1e-5)
    if coefficient != "0":
        assert all(loss > 0 for loss in together[2])
        assert untold[2] != pytest.approx(cut[2], rel=1e-3)
