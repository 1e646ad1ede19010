"""A subject that breaks behind its first row, for the tests of the suite."""

from __future__ import annotations

from collections.abc import Iterator

from tests.gpu.machine import Machine
from tests.gpu.rows import Row, at_most


def rows(machine: Machine) -> Iterator[Row]:
    yield at_most("a claim", 0, 1)
    raise RuntimeError("it breaks")
