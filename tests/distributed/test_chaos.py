"""Ten faults of ten kinds, one after the other: the run ends as one that was left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

SEED = 1
LIMIT = 900.0  # seconds


@pytest.mark.slow
@pytest.mark.distributed
def test_ten_faults(tmp_path: Path) -> None:
    # A process of its own: its fork server has nothing of this one's.
    words = ["--faults", "10", "--seed", str(SEED), "--json", str(tmp_path / "table.json")]
    told = subprocess.run(
        [sys.executable, "-m", "tests.stress.chaos", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    assert sum(line["number"] for line in table) >= 10
    assert len(table) >= 6
