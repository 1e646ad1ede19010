from __future__ import annotations

import io
import sys

import pytest

from megatron_trinity.progress import (
    BarProgress,
    LineProgress,
    SilentProgress,
    progress_for_terminal,
)


def test_a_line_every_five_seconds() -> None:
    times = iter([0.0, 1.0, 5.0, 9.9, 10.0])
    stream = io.StringIO()
    with LineProgress(40_000_000, stream, lambda: next(times)) as progress:
        for step in range(1, 5):
            progress.update(10_000_000 * step, f"{step} files")
    assert stream.getvalue().splitlines() == [
        "2 files, 20.0 MB (50%), 4.0 MB/s, 0:00:05 left",
        "4 files, 40.0 MB (100%), 4.0 MB/s, 0:00:00 left",
    ]


def test_no_share_where_the_total_is_unknown() -> None:
    times = iter([0.0, 5.0])
    stream = io.StringIO()
    LineProgress(None, stream, lambda: next(times)).update(3_000_000)
    assert stream.getvalue() == "3.0 MB, 0.6 MB/s\n"


def test_bar_on_a_terminal_and_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(progress_for_terminal(None), LineProgress)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert isinstance(progress_for_terminal(None), BarProgress)


@pytest.mark.parametrize("total", [None, 100])
def test_bar_draws(total: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    with BarProgress(total) as progress:
        progress.update(50, "7 documents, 1,234 tokens")
    assert "7 documents, 1,234 tokens" in " ".join(capsys.readouterr().err.split())


def test_silence() -> None:
    with SilentProgress(3) as progress:
        progress.update(3)
