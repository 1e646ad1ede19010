"""Ranks that have Transformer Engine, beside those of the project's own environment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Kind, RankPools
from tests.environments import packages, prepared
from tests.transformer_engine.worker import PACKAGES, load_emulated


@pytest.fixture(scope="session")
def te_ranks(request: pytest.FixtureRequest) -> Iterator[RankPools]:
    """As `ranks`, with Transformer Engine's Python modules over the emulation."""
    kind = Kind(
        "tests.transformer_engine.preload",
        load_emulated,
        {PACKAGES: str(packages(prepared(request, "te")))},
    )
    with RankPools(kind) as pools:
        yield pools
