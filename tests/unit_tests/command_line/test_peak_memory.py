"""Memory of a piece of work, of bytes that are touched."""

from __future__ import annotations

import pytest

from megatron_trinity.command_line.peak_memory import Work, peak_memory

MIB = 2**20


def test_what_is_prepared_and_freed_does_not_count() -> None:
    def prepare() -> Work:
        kept = b"1" * (64 * MIB)
        bytearray(b"1") * (256 * MIB)  # freed at once
        return lambda: len(kept) + len(b"1" * (32 * MIB))

    assert peak_memory(prepare) == pytest.approx(32 * MIB, abs=4 * MIB)
