"""Runs that are killed at random moments go on from a whole checkpoint, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stress.kill_saves import kill_saves

KILLS = 30
SEED = 20


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_run_goes_on_from_a_whole_checkpoint(tmp_path: Path) -> None:
    killed = kill_saves(tmp_path / "kills", KILLS, SEED, print)
    assert killed.total() == KILLS
    assert killed["inside"] >= KILLS // 5
    assert killed["outside"] >= 1
