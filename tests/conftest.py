"""What every test shares: one thread a process, the same random numbers, the pools of ranks."""

import os

# Before anything imports torch or NumPy, which read it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from megatron_trinity.upstream import adapt_megatron
from tests import verification
from tests.distributed.pool import RankPools

# A busy machine makes single examples slow, and a failure has to come back on the next run.
settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-verification",
        action="store_true",
        help="write down in docs/verification/ what has been verified of each preset",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-verification") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(verification.Recorder())
    # A shell starts background jobs with Ctrl-C ignored, and tests of it would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Before any test module imports megatron-core, as an entry point does it.
    adapt_megatron()


# First, so that what a fixture draws does not depend on the tests before either.
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    random.seed(1)
    torch.manual_seed(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """Runs module-level functions on ranks: `ranks.run(fn, *args, world_size=4)`."""
    with RankPools() as pools:
        yield pools


MARKERS = {
    "ranks": ("distributed",),
    "te_ranks": ("te", "distributed"),
    "dali_ranks": ("dali", "distributed"),
    "browser": ("browser",),
}
"""Of the tests that use a fixture."""


# First, so that `-m "not distributed"` sees the marker.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    verification.note(items)
    for item in items:
        for fixture in MARKERS.keys() & {*getattr(item, "fixturenames", ())}:
            for name in MARKERS[fixture]:
                item.add_marker(name)
