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


# First, so that `-m dali` and `-m "not dali"` see the marker.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "dali_ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.dali)
            item.add_marker(pytest.mark.distributed)
