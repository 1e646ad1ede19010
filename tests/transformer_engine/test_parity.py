"""The model on Transformer Engine's modules is the portable one: logits and every gradient."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.pool import RankPools
from tests.transformer_engine.models import TE, distances, run_model
from tests.unit_tests.model.test_hf_parity import CASES

BF16 = 2e-2
"""Both round to 8 bits at the same places, but attention in another order."""


def compare(
    ranks: RankPools,
    te_ranks: RankPools,
    overrides: dict[str, Any],
    length: int,
    flags: tuple[str, ...] = (),
    documents: Any = None,
) -> dict[str, float]:
    arguments = (overrides, length)
    [(expected, portable)] = ranks.run(run_model, *arguments, flags, documents, world_size=1)
    [(got, kinds)] = te_ranks.run(run_model, *arguments, (*flags, *TE), documents, world_size=1)
    assert not any(kind.startswith("TE") for kind in portable)
    assert {
        "TEColumnParallelLinear",
        "TERowParallelLinear",
        "TEColumnParallelGroupedLinear",
        "TransformerEngineCoreAttention",
        "TrinityRMSNorm",
    } <= kinds
    assert not {"PortableCoreAttention", "GroupedExperts", "RowParallelLinear"} & kinds
    return distances(got, expected)


@pytest.mark.parametrize("case", CASES)
def test_in_fp32(ranks: RankPools, te_ranks: RankPools, case: str) -> None:
    length, overrides = CASES[case]
    found = compare(ranks, te_ranks, overrides, length)
    assert max(found.values()) <= 1e-5, max(found, key=found.__getitem__)


@pytest.mark.parametrize("case", CASES)
def test_in_bf16(ranks: RankPools, te_ranks: RankPools, case: str) -> None:
    length, overrides = CASES[case]
    found = compare(ranks, te_ranks, overrides, length, ("--bf16",))
    assert max(found.values()) <= BF16, max(found, key=found.__getitem__)
