"""One model, one answer: Transformer Engine's modules in a layout train as the portable ones on one
rank, which has none of them installed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.layouts import ALONE, Layout, ranks_of
from tests.distributed.pool import RankPools
from tests.distributed.test_layouts import Answer, answers_of_one_rank, check, kind_of, train
from tests.trainer import write_dataset
from tests.transformer_engine.models import TE

FIRST: tuple[Layout, ...] = (
    (),
    ("documents", "muon"),
    ("TP 2 + SP", "documents", "micro-batch 1"),
    ("PP 2",),
    ("EP 2", "DP 2", "distributed optimizer"),
    ("EP 2", "DP 2", "distributed optimizer", "muon"),
    ("CP 2 all-gather", "documents"),
    ("CP 2 a2a", "documents"),
    ("CP 2 all-gather",),
    ("TP 2 + SP", "EP 2", "ETP 1", "CP 4 all-gather"),
    ("TP 2 + SP", "CP 2 a2a", "full recompute", "muon"),
)
LAYOUTS = (*FIRST, *(layout for layout in ALONE if layout not in FIRST))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layouts") / "data"
    write_dataset(path)
    return path


@pytest.fixture(scope="module")
def references(
    ranks: RankPools, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Layout, Answer]:
    return answers_of_one_rank(ranks, data, tmp_path_factory.mktemp("references"))


def products_made(rank: int, world_size: int) -> tuple[int, int]:
    """Of Transformer Engine on this rank since it was last asked, and those of routed experts."""
    from tests.transformer_engine.emulation.extension import calls

    made = calls["generic_gemm"], calls["te_general_grouped_gemm"]
    calls.clear()
    return made


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(x, id=" | ".join(x) or "one rank", marks=[pytest.mark.slow] * (x not in FIRST))
        for x in LAYOUTS
    ],
)
def test_a_layout_gives_the_answer_of_the_portable_one(
    te_ranks: RankPools,
    data: Path,
    references: dict[Layout, Answer],
    tmp_path: Path,
    layout: Layout,
) -> None:
    got = train(te_ranks, data, tmp_path / "run", layout, TE)
    made = te_ranks.run(products_made, world_size=ranks_of(layout))
    assert all(products > 0 for products, _ in made)
    assert any(grouped > 0 for _, grouped in made)  # a stage may have dense layers alone
    check(got, references[kind_of(layout)], layout)
