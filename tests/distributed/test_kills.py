"""Runs that are killed at random moments go on from a whole checkpoint, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crosses import slow
from tests.stress.kill_saves import MODES, kill_saves

SEED = 20


@pytest.mark.distributed
@pytest.mark.parametrize("kills", [len(MODES), slow(30)])
def test_a_killed_run_goes_on_from_a_whole_checkpoint(tmp_path: Path, kills: int) -> None:
    killed = kill_saves(tmp_path / "kills", kills, SEED, print)
    assert killed.total() == kills
    if kills > len(MODES):  # where a single one falls is chance
        assert killed["inside"] >= kills // 5
        assert killed["outside"] >= 1
