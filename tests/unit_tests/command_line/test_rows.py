"""Rows of benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_trinity.command_line.rows import make_row, write_rows


@pytest.mark.parametrize(
    ("ours", "peer", "more_is_better", "ratio"),
    [
        (2.0, 6.0, False, 3.0),
        (6.0, 2.0, True, 3.0),
        (2.0, None, False, None),
        (0.0, 1.0, False, None),
    ],
    ids=["less is better", "more is better", "no peer", "nothing to divide by"],
)
def test_a_ratio_above_one_is_in_favour_of_ours(
    ours: float, peer: float | None, more_is_better: bool, ratio: float | None
) -> None:
    row = make_row("a case", ours, peer, "s", more_is_better=more_is_better)
    assert row == {"case": "a case", "ours": ours, "peer": peer, "unit": "s", "ratio": ratio}


def test_rows_are_written_where_a_file_is_named(tmp_path: Path) -> None:
    rows = [make_row("a case", 1.0, 2.0, "s")]
    write_rows(None, rows)
    assert not list(tmp_path.iterdir())
    write_rows(tmp_path / "rows.json", rows)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
