"""Ranks that have NVIDIA DALI."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dali.kind import dali_kind
from tests.distributed.pool import RankPools
from tests.environments import prepared


@pytest.fixture(scope="session")
def dali_ranks(request: pytest.FixtureRequest) -> Iterator[RankPools]:
    """As `ranks`, with DALI."""
    with RankPools(dali_kind(prepared(request, "dali"))) as pools:
        yield pools
