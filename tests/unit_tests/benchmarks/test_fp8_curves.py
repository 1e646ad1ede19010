"""The figures of the benchmark of FP8's curves, made up instead of trained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import fp8_curves
from megatron_trinity.command_line.curves import LOSS, VALIDATION_LOSS
from megatron_trinity.errors import TrinityError

STEPS = 10


def curves(**off: float) -> dict[str, fp8_curves.Scalars]:
    """Losses that fall evenly, of some recipes with something on top."""
    losses = {step: 5.0 - step / 10 for step in range(1, STEPS + 1)}
    return {
        name: {
            LOSS: {step: loss + off.get(name[4:], 0.0) for step, loss in losses.items()},
            VALIDATION_LOSS: {STEPS: 4.5},
        }
        for name in fp8_curves.RUNS
    }


def test_distances_are_from_bf16() -> None:
    lines = fp8_curves.table(curves(delayed=0.25), STEPS).splitlines()
    assert "| fp8-delayed | 4.7000 | 4.5000 | 0.2500 | 0.2500 |" in lines
    assert "| fp8-blockwise | 4.4500 | 4.5000 | 0.0000 | 0.0000 |" in lines
    rows = {row["case"]: row for row in fp8_curves.rows(curves(delayed=0.25))}
    assert len(rows) == 6
    assert rows["lm loss: fp8-delayed against bf16"]["ratio"] == pytest.approx(4.45 / 4.7)


def test_one_that_ends_away_from_bf16_fails() -> None:
    fp8_curves.check_near(curves(delayed=0.019))
    with pytest.raises(TrinityError, match=r"more than 0\.02 apart"):
        fp8_curves.check_near(curves(delayed=-0.021))


def test_a_short_run_has_lines_in_the_figure(tmp_path: Path) -> None:
    figure = tmp_path / "fp8.svg"
    fp8_curves.draw(curves(delayed=0.1, blockwise=0.2), figure)
    for name, (colour, _) in fp8_curves.RUNS.items():
        paths = re.findall(rf'<path d="([^"]*)"[^>]*stroke: {colour.lower()}', figure.read_text())
        # Above, below, and a short one in the legend; of bf16 what is below is the axis.
        longest = max(path.count("L") for path in paths)
        assert longest >= 5, name
        assert name in figure.read_text()
