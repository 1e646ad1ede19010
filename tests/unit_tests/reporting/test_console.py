"""Lines of a console: aligned, of three digits, within their width."""

from __future__ import annotations

import io

import pytest

from megatron_trinity.reporting.console import (
    HEADER_EVERY,
    WIDTH,
    StepConsole,
    StepValues,
    digits,
    header,
    mean_of,
    step_line,
    table_lines,
    time_left,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0.00"),
        (1.2345, "1.23"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (12345.0, "12.3k"),
        (1.5e7, "15.0M"),
        (3.2e10, "32.0G"),
        (0.00123, "1.23e-03"),
        (float("nan"), "nan"),
    ],
)
def test_three_significant_digits(value: float | None, text: str) -> None:
    assert digits(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (83.4, "0:01:23"), (86399, "23:59:59"), (86400 * 3 + 3700, "3d 01:01")],
)
def test_time_left(seconds: float, text: str) -> None:
    assert time_left(seconds) == text


FULL = StepValues(
    iteration=1_234_567,
    seconds=0.5,
    tokens=16_777_216,
    loss=11.123456,
    norm=123.456,
    rates={"muon": 1.2345e-3, "adamw": 2e-4},
    tflops=412.34,
    memory=71.234,
    violation=(12.345, 53),
)


def test_a_line_fits_and_stands_under_its_header() -> None:
    line, names = step_line(FULL, 2_000_000), header(["muon", "adamw"], 2_000_000)
    assert len(line) == len(names) <= WIDTH
    told = "1234567/2000000 61.7% 11.1235 123 1.23e-3 2.00e-4 33.6M 412 71.2 12.3 53 4d 10:18"
    assert " ".join(line.split()) == told
    told = "iteration done loss norm lr muon lr adamw tokens/s TFLOP/s GiB MaxVio layer left"
    assert " ".join(names.split()) == told


def test_what_is_not_known_is_a_dash() -> None:
    line = step_line(StepValues(iteration=1, seconds=2.0, tokens=8), 4)
    assert line.split() == ["1/4", "25.0%", "-", "-", "4.00", "-", "-", "-", "-", "0:00:06"]


def test_several_steps_are_a_mean_and_their_worst_layer() -> None:
    steps = [
        StepValues(1, 1.0, 10, 4.0, 1.0, {"muon": 1.0}, 2.0, 5.0, (0.5, 3)),
        StepValues(2, 3.0, 30, None, None, {"muon": 2.0}, 4.0, 6.0, None),
        StepValues(3, 2.0, 20, 2.0, 3.0, {"muon": 3.0}, 3.0, 4.0, (0.9, 2)),
    ]
    work = (1 * 2 + 3 * 4 + 2 * 3) / (1 + 3 + 2)
    assert mean_of(steps) == StepValues(3, 2.0, 20, 3.0, 2.0, {"muon": 3.0}, work, 4.0, (0.9, 2))


def test_a_file_gets_plain_lines_of_whole_intervals() -> None:
    stream = io.StringIO()
    console = StepConsole(last=200, interval=2, stream=stream)
    for number in range(5, 9):  # as behind a resume
        console.step(StepValues(number, 1.0, 8, float(number)))
        if number == 6:
            console.mark("saved", "saved 6")
    console.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["iteration", "done", "loss"],
        ["5/200", "2.5%", "5.0000"],
        ["6/200", "3.0%", "5.5000"],
        ["--", "saved", "6"],
        ["8/200", "4.0%", "7.5000"],
    ]
    assert "\x1b" not in stream.getvalue()


def test_headers_come_again() -> None:
    stream = io.StringIO()
    console = StepConsole(last=100, interval=1, stream=stream)
    for number in range(1, HEADER_EVERY + 2):
        console.step(StepValues(number, 1.0, 8))
    heads = [n for n, line in enumerate(stream.getvalue().splitlines()) if "iteration" in line]
    assert heads == [0, HEADER_EVERY + 1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_colours_and_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    console = StepConsole(last=4, interval=1, stream=stream)
    console.step(StepValues(1, 1.0, 8, 3.25))
    console.mark("evaluated", "evaluated at 1")
    console.close()
    text = stream.getvalue()
    assert "3.2500" in text
    assert "1/4" in text
    assert "\x1b[36m -- evaluated at 1" in text
    assert "━" in text
    assert text.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in text  # the cursor is back


def test_a_table_goes_on_beneath_itself() -> None:
    lines = table_lines("run", {"model": "word " * 40, "data": "one"})
    assert lines[0] == "run"
    assert lines[1].startswith("  model  word")
    assert lines[2].startswith("         word")
    assert lines[-1] == "  data   one"
    assert max(map(len, lines)) <= WIDTH
