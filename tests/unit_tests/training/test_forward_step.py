"""The losses that Megatron's schedules get, against their closed forms."""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_trinity.model.loss import Row
from tests.distributed.pool import RankPools

BATCH, LENGTH = 6, 7
Z_LOSS = 1e-2


def micro_batch(
    masked_tokens: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A loss mask `[b, s]` and a model's output `[4, b, s]`."""
    generator = torch.Generator().manual_seed(1)
    output = 3 * torch.rand(len(Row), BATCH, LENGTH, generator=generator, dtype=torch.float64)
    mask = torch.ones(BATCH * LENGTH)
    mask[torch.randperm(BATCH * LENGTH, generator=generator)[:masked_tokens]] = 0
    return mask.view(BATCH, LENGTH), output.to(dtype)


def sums(mask: Tensor, output: Tensor, z_loss_coeff: float) -> dict[str, float]:
    """What is reported, in float64."""
    of_token, counted = output.double().numpy(), mask.numpy()
    return {
        "lm loss": float(np.sum(of_token[Row.CROSS_ENTROPY] * counted)),
        "z loss": z_loss_coeff * float(np.sum(of_token[Row.LOG_SUM_EXP] ** 2 * counted)),
    }


def masked(
    rank: int, world_size: int, mask: Tensor, output: Tensor, z_loss_coeff: float, size: int
) -> list[dict[str, Any]]:
    """`masked_loss` of each micro-batch of `size` sequences."""
    from megatron_trinity.training.forward_step import masked_loss

    results = []
    for start in range(0, BATCH, size):
        part = output[:, start : start + size].clone().requires_grad_()
        total, tokens, report = masked_loss(mask[start : start + size], part, z_loss_coeff)
        assert total._base is None  # which pipeline stages ask of what they free
        total.backward()
        results.append(
            {
                "total": total.detach(),
                "tokens": tokens,
                "report": report,
                "gradient": part.grad,
                "needs gradient": any(pair.requires_grad for pair in report.values()),
            }
        )
    return results


@pytest.mark.parametrize("z_loss_coeff", [0.0, Z_LOSS])
@pytest.mark.parametrize("masked_tokens", [0, 5, BATCH * LENGTH])
def test_masked_loss(ranks: RankPools, masked_tokens: int, z_loss_coeff: float) -> None:
    mask, output = micro_batch(masked_tokens)
    [[got]] = ranks.run(masked, mask, output, z_loss_coeff, BATCH, world_size=1)
    expected, tokens = sums(mask, output, z_loss_coeff), BATCH * LENGTH - masked_tokens
    total = expected["lm loss"] + expected["z loss"]
    assert got["total"].item() == pytest.approx(total, rel=1e-6, abs=0)
    assert got["total"].dtype == torch.float32
    assert got["tokens"].dtype == torch.int32
    assert got["tokens"].item() == tokens

    names = ["lm loss"] + ["z loss"] * (z_loss_coeff > 0)
    assert sorted(got["report"]) == names
    for name in names:
        value, number = got["report"][name].tolist()
        assert value == pytest.approx(expected[name], rel=1e-6, abs=0), name
        assert number == tokens
    assert not got["needs gradient"]

    gradient = torch.zeros_like(output)
    gradient[Row.CROSS_ENTROPY] = mask
    gradient[Row.LOG_SUM_EXP] = 2 * z_loss_coeff * output[Row.LOG_SUM_EXP] * mask
    torch.testing.assert_close(got["gradient"], gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 2, 3, BATCH])
def test_z_loss_is_a_mean_over_tokens_whatever_the_micro_batch(ranks: RankPools, size: int) -> None:
    mask, output = micro_batch(masked_tokens=17)
    mask[2] = 0  # a micro-batch without a token, where they are of one sequence
    got = ranks.run(masked, mask, output, Z_LOSS, size, world_size=1)[0]
    assert len(got) == BATCH // size
    tokens = sum(part["tokens"].item() for part in got)
    assert tokens == mask.sum()
    for name, expected in sums(mask, output, Z_LOSS).items():
        value, number = sum(part["report"][name] for part in got).tolist()
        assert number == tokens
        assert value / number == pytest.approx(expected / tokens, rel=1e-6, abs=0)
    whole = ranks.run(masked, mask, output, Z_LOSS, BATCH, world_size=1)[0][0]
    gradient = torch.cat([part["gradient"] for part in got], dim=1)
    assert torch.equal(gradient, whole["gradient"])


def noted(rank: int, world_size: int, masked_tokens: int) -> list[list[float]]:
    from megatron_trinity.training.forward_step import masked_loss
    from megatron_trinity.training.micro_batches import MicroBatchRecord

    class Rows(MicroBatchRecord):
        def append(self, values: Tensor) -> None:
            rows.append(values.tolist())

    rows: list[list[float]] = []
    mask, output = micro_batch(masked_tokens)
    masked_loss(mask, output.requires_grad_(), Z_LOSS, Rows())
    return rows


@pytest.mark.parametrize("masked_tokens", [0, 30, BATCH * LENGTH])
def test_a_micro_batch_is_noted_without_its_z_loss(ranks: RankPools, masked_tokens: int) -> None:
    mask, output = micro_batch(masked_tokens)
    counted = output[Row.LARGEST_LOGIT][mask > 0].tolist()
    [[[loss, tokens, mean_logits, largest]]] = ranks.run(noted, masked_tokens, world_size=1)
    assert loss == pytest.approx(sums(mask, output, 0.0)["lm loss"], rel=1e-6, abs=0)
    assert tokens == mask.sum()
    assert largest == max(counted, default=-torch.inf)
    mean_logit = output[Row.MEAN_LOGIT][mask > 0].double().sum().item()
    assert mean_logits == pytest.approx(mean_logit, rel=1e-6, abs=0)


def gradients(rank: int, world_size: int, added: float) -> tuple[float, Tensor]:
    """Of a loss to which a constant is added."""
    from megatron_trinity.training.forward_step import masked_loss

    mask, output = micro_batch(masked_tokens=5)
    output.requires_grad_()
    constant = torch.zeros_like(output)
    constant[Row.CROSS_ENTROPY] = added
    total, _, _ = masked_loss(mask, output + constant, Z_LOSS)
    (gradient,) = torch.autograd.grad(total, output)
    return total.item(), gradient


def test_a_loss_that_is_not_finite_has_no_finite_gradient(ranks: RankPools) -> None:
    """Of an infinite constant the gradient would be that of the rest, and be applied."""
    [(total, gradient)] = ranks.run(gradients, 0.0, world_size=1)
    mask, output = micro_batch(masked_tokens=5)
    expected = sums(mask, output, Z_LOSS)
    assert total == pytest.approx(expected["lm loss"] + expected["z loss"], rel=1e-6, abs=0)
    assert torch.equal(gradient[Row.CROSS_ENTROPY], mask)
    [(total, gradient)] = ranks.run(gradients, torch.inf, world_size=1)
    assert not math.isfinite(total)
    assert gradient[Row.CROSS_ENTROPY].isnan().all()


class Output(nn.Module):
    """A model that gives `[4, b, s]` as the last stage does."""

    vp_stage = None

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(
        self,
        tokens: Tensor,
        *_: Any,
        labels: Tensor,
        loss_mask: Tensor,
        packed_seq_params: None,
    ) -> Tensor:
        assert tokens.shape == labels.shape == loss_mask.shape == (BATCH, LENGTH)
        return self.output * 1


def step(
    rank: int, world_size: int, iteration: int | None, start: int, evaluation: bool
) -> tuple[float, list[str], dict[str, float]]:
    """Loss, names in the report, and the record of one micro-batch."""
    from megatron.core import parallel_state
    from megatron.training.global_vars import set_args

    from megatron_trinity.training.forward_step import forward_step
    from megatron_trinity.training.micro_batches import MicroBatchRecord

    parallel_state.initialize_model_parallel()
    args = Namespace(
        context_parallel_size=1,
        micro_batch_size=BATCH,
        eval_micro_batch_size=BATCH,
        dataloader_inter_document_masking=False,
        seq_length=LENGTH,
        pipeline_model_parallel_size=1,
        z_loss_coeff=Z_LOSS,
        z_loss_start_iteration=start,
    )
    if iteration is not None:
        args.curr_iteration = iteration - 1
    set_args(args)
    mask, output = micro_batch(masked_tokens=5)
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    data = {"tokens": tokens, "labels": tokens, "position_ids": tokens, "loss_mask": mask}
    record = MicroBatchRecord()
    with torch.set_grad_enabled(not evaluation):
        out, loss_function = forward_step(iter([data]), Output(output), record=record)
        total, _, report = loss_function(out)
    return total.item(), sorted(report), record.reduce()


@pytest.mark.parametrize(
    ("iteration", "start", "on"), [(1, 0, True), (1, 1, True), (4, 5, False), (5, 5, True)]
)
def test_z_loss_starts_at_its_iteration(
    ranks: RankPools, iteration: int, start: int, on: bool
) -> None:
    [(total, names, record)] = ranks.run(step, iteration, start, False, world_size=1)
    expected = sums(*micro_batch(masked_tokens=5), Z_LOSS if on else 0.0)
    assert total == pytest.approx(expected["lm loss"] + expected["z loss"], rel=1e-6, abs=0)
    assert names == ["lm loss"] + ["z loss"] * on
    assert sorted(record) == ["batch heterogeneity", "max logit", "mean logit"]


@pytest.mark.parametrize("iteration", [None, 5])
def test_evaluation_is_without_z_loss_and_not_recorded(
    ranks: RankPools, iteration: int | None
) -> None:
    # None: there is no iteration where Megatron evaluates without training.
    [(total, names, record)] = ranks.run(step, iteration, 0, True, world_size=1)
    expected = sums(*micro_batch(masked_tokens=5), 0.0)
    assert total == pytest.approx(expected["lm loss"], rel=1e-6, abs=0)
    assert names == ["lm loss"]
    assert record == {}
