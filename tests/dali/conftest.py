"""Ranks that have NVIDIA DALI."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dali.worker import PACKAGES, load_with_dali
from tests.distributed.pool import Kind, RankPools
from tests.environments import packages, prepared


@pytest.fixture(scope="session")
def dali_ranks(request: pytest.FixtureRequest) -> Iterator[RankPools]:
    """As `ranks`, with DALI."""
    folder = str(packages(prepared(request, "dali")))
    with RankPools(Kind("tests.dali.preload", load_with_dali, {PACKAGES: folder})) as pools:
        yield pools
