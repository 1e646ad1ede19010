"""The benchmark of overlap: what is compared, and that its runs are runs of the trainer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks import overlap


def test_sides_take_turns_and_a_figure_is_a_median(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, Sequence[str]]] = []

    def times(ranks: int, steps: int, flags: Sequence[str]) -> list[float]:
        asked.append((ranks, steps, flags))
        return [0.2, 0.3, 9.0] if flags else [0.6, 0.6, 0.1]

    monkeypatch.setattr(overlap, "step_times", times)
    row = overlap.compare(ranks=4, buckets="4 buckets", steps=3, repetitions=2)
    overlapped = (*overlap.OVERLAP, "--ddp-num-buckets", "4")
    assert asked == [(4, 3, ()), (4, 3, overlapped)] * 2
    assert row["ours"] == pytest.approx(300)
    assert row["peer"] == pytest.approx(600)
    assert row["ratio"] == pytest.approx(2)


@pytest.mark.slow
def test_a_run_gives_the_time_of_each_step_behind_the_first_ones() -> None:
    times = overlap.step_times(2, 2, overlap.OVERLAP)
    assert len(times) == 2
    assert all(0 < seconds < 60 for seconds in times)
