"""Crosses of cases: what a newcomer waits for, and what is left to `bash tests/run.sh --all`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def first(count: int, cases: Iterable[Any]) -> list[Any]:
    """`cases` for `parametrize`, of which all behind the first `count` are marked slow.

    The first ones are chosen so that each claim of the test is made at least once.
    """
    return [case if number < count else slow(case) for number, case in enumerate(cases)]


def slow(case: Any) -> Any:
    """A case, one value or a tuple of them, that is marked slow."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
