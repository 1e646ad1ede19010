"""The loss that Megatron's schedules get, against its closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.pool import RankPools

BATCH, LENGTH = 3, 7


def masked(rank: int, world_size: int, masked_tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    from megatron_trinity.training.forward_step import masked_loss

    generator = torch.Generator().manual_seed(1)
    losses = (3 * torch.rand(BATCH, LENGTH, generator=generator)).to(dtype).requires_grad_()
    mask = torch.ones(BATCH * LENGTH)
    mask[torch.randperm(BATCH * LENGTH, generator=generator)[:masked_tokens]] = 0
    mask = mask.view(BATCH, LENGTH)
    total, tokens, report = masked_loss(mask, losses)
    total.backward()
    return {
        "losses": losses.detach().double().numpy(),
        "mask": mask.numpy(),
        "total": total.detach(),
        "tokens": tokens,
        "report": report,
        "gradient": losses.grad,
        "report needs gradient": report["lm loss"].requires_grad,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked_tokens", [0, 5, BATCH * LENGTH])
def test_masked_loss(ranks: RankPools, masked_tokens: int, dtype: torch.dtype) -> None:
    [got] = ranks.run(masked, masked_tokens, dtype, world_size=1)
    expected = float(np.sum(got["losses"] * got["mask"]))
    assert got["total"].item() == pytest.approx(expected, rel=1e-6, abs=0)
    assert got["total"].dtype == torch.float32
    assert got["tokens"].dtype == torch.int32
    assert got["tokens"].item() == BATCH * LENGTH - masked_tokens
    assert list(got["report"]) == ["lm loss"]
    assert got["report"]["lm loss"].tolist() == [got["total"].item(), got["tokens"].item()]
    assert not got["report needs gradient"]
    np.testing.assert_array_equal(got["gradient"].float().numpy(), got["mask"])
