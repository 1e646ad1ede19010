"""The model on Transformer Engine's modules is the portable one: logits and every gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.crosses import first
from tests.distributed.pool import RankPools
from tests.trainer import FULL_RECOMPUTE
from tests.transformer_engine.models import BATCH, TE, distances, run_model
from tests.trinity import afmoe_config, build, parse
from tests.unit_tests.model.test_hf_parity import CASES

Documents = Sequence[Sequence[int]] | None


def compare(
    ranks: RankPools,
    te_ranks: RankPools,
    overrides: dict[str, Any],
    length: int,
    flags: tuple[str, ...] = (),
    documents: Documents = None,
) -> dict[str, float]:
    arguments = (overrides, length)
    [(expected, portable)] = ranks.run(run_model, *arguments, flags, documents, world_size=1)
    [(got, kinds)] = te_ranks.run(run_model, *arguments, (*flags, *TE), documents, world_size=1)
    assert not any(kind.startswith("TE") for kind in portable)
    assert {
        "_ColumnParallelLinear",
        "_RowParallelLinear",
        "_ColumnParallelGroupedLinear",
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


@pytest.mark.parametrize("case", first(3, CASES))
def test_in_bf16(ranks: RankPools, te_ranks: RankPools, case: str) -> None:
    """Each rounds in places of its own, so that both are held to fp32: as near as the portable."""
    length, overrides = CASES[case]
    check_bf16(ranks, te_ranks, overrides, length, None)


def check_bf16(
    ranks: RankPools,
    te_ranks: RankPools,
    overrides: dict[str, Any],
    length: int,
    documents: Documents,
) -> None:
    more = (documents, True)
    [(exact, _)] = ranks.run(run_model, overrides, length, (), *more, world_size=1)
    [(portable, _)] = ranks.run(run_model, overrides, length, ("--bf16",), *more, world_size=1)
    [(got, _)] = te_ranks.run(run_model, overrides, length, ("--bf16", *TE), *more, world_size=1)
    errors, allowed = distances(got, exact), distances(portable, exact)
    assert errors["logits"] <= 1.2 * allowed["logits"] <= 2e-2
    for name, error in errors.items():
        assert error <= 1.5 * allowed[name] + 2e-2, name


# Lengths of the documents of two sequences: one token, as long as the window, longer, alone.
LENGTH = 37
PACKED: dict[str, Documents] = {
    "many": ((5, 1, 7, 24), (20, 3, 3, 11)),
    "one sequence is whole": ((LENGTH,), (1, 36)),
    "single tokens": ((1,) * LENGTH, (36, 1)),
}


@pytest.mark.parametrize("case", PACKED)
def test_documents(ranks: RankPools, te_ranks: RankPools, case: str) -> None:
    found = compare(ranks, te_ranks, {}, LENGTH, documents=PACKED[case])
    assert max(found.values()) <= 1e-5, max(found, key=found.__getitem__)
    check_bf16(ranks, te_ranks, {}, LENGTH, PACKED[case])


def leak(
    rank: int, world_size: int, flags: tuple[str, ...], documents: Documents
) -> tuple[float, float]:
    """How far logits of both sequences' last documents move when tokens before them change."""
    from tests.transformer_engine.models import packed

    model = build(parse(afmoe_config(), (*flags, *TE)))
    tokens = torch.randint(160, (BATCH, LENGTH))
    others, behind = tokens.clone(), min(lengths[-1] for lengths in documents or ())
    others[:, :-behind] = (others[:, :-behind] + 1) % 160
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    moved = []
    for which in (packed(documents, LENGTH), None):
        with torch.no_grad():
            a, b = (model(x, positions, None, packed_seq_params=which) for x in (tokens, others))
        moved.append(float((a - b)[:, -behind:].abs().max()))
    return moved[0], moved[1]


@pytest.mark.parametrize("flags", [(), ("--bf16",)], ids=["fp32", "bf16"])
def test_documents_do_not_see_each_other(te_ranks: RankPools, flags: tuple[str, ...]) -> None:
    documents = ((5, 1, 20, 11), (20, 3, 3, 11))
    [(among, whole)] = te_ranks.run(leak, flags, documents, world_size=1)
    assert among == 0.0
    assert whole > 1e-3, "without documents the same tokens are seen"


@pytest.mark.parametrize(
    "flags",
    [
        FULL_RECOMPUTE,
        (
            *("--recompute-granularity", "selective"),
            *("--recompute-modules", "core_attn", "moe", "layernorm"),
        ),
    ],
    ids=["full", "selective"],
)
@pytest.mark.parametrize("documents", [None, PACKED["many"]], ids=["sequences", "documents"])
def test_recompute(te_ranks: RankPools, flags: tuple[str, ...], documents: Documents) -> None:
    [(plain, _)] = te_ranks.run(run_model, {}, LENGTH, TE, documents, world_size=1)
    [(again, _)] = te_ranks.run(run_model, {}, LENGTH, (*TE, *flags), documents, world_size=1)
    for name, tensor in plain.items():
        assert torch.equal(tensor, again[name]), name
