"""Machines that report CUDA, with and without what else may be installed there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import pytest

from tests.cuda_start.machine import load_on
from tests.distributed.pool import Kind, RankPools

Machines = dict[str, RankPools]

PACKAGES = {
    "bare": (),
    "both": ("apex", "transformer_engine"),
    "te": ("transformer_engine",),
    "apex": ("apex",),
}
"""Machines by name, and what of `stand_ins/` they have; the first two make every claim once."""


EVERYTHING = {"all": ("apex", "transformer_engine", "deep_ep")}
"""A machine for what needs DeepEP too; the others make the claims that do not."""


@pytest.fixture(scope="session")
def machines() -> Iterator[Machines]:
    """Pools of ranks on each machine; a pool starts when it is needed."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(RankPools(Kind(None, partial(load_on, packages))))
            for name, packages in (PACKAGES | EVERYTHING).items()
        }
