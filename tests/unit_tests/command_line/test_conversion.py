"""Flags and messages of conversions."""

from __future__ import annotations

import pytest

from megatron_trinity.command_line.conversion import memory_and_workers
from megatron_trinity.errors import UsageError


def test_numbers_that_make_no_sense() -> None:
    assert memory_and_workers(1.5, 3) == (3 * 2**29, 3)
    assert memory_and_workers(1.0, None)[1] >= 1
    for memory, workers in ((0.0, 1), (1.0, 0)):
        with pytest.raises(UsageError, match="have to be positive"):
            memory_and_workers(memory, workers)
