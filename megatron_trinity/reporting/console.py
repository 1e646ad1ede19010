"""The lines of a run for people: one a step, aligned, and marked ones for all else.

On a terminal there are colours and a bar beneath them; elsewhere they are plain.
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from statistics import fmean
from typing import TYPE_CHECKING, TextIO

from megatron_trinity.tables import print_table

if TYPE_CHECKING:
    from rich.progress import Progress

WIDTH = 120
"""Columns that no line of a step goes beyond."""

HEADER_EVERY = 40
"""Lines of steps from one header to the next."""


@dataclass(frozen=True)
class StepValues:
    """What a line says of one step; what is None is not known of it.

    Attributes:
        rates: learning rate by optimizer.
        tokens: of the step.
        tflops: per GPU or process.
        memory: peak, GiB.
        violation: the largest MaxVio, and the layer that has it.
    """

    iteration: int
    seconds: float
    tokens: int
    loss: float | None = None
    norm: float | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    tflops: float | None = None
    memory: float | None = None
    violation: tuple[float, int] | None = None


def mean_of(steps: Sequence[StepValues]) -> StepValues:
    """One line for several steps: means, the largest violation, and the newest of the rest."""
    newest = steps[-1]
    losses = [step.loss for step in steps if step.loss is not None]
    norms = [step.norm for step in steps if step.norm is not None]
    seconds = fmean(step.seconds for step in steps)
    work = [step.tflops * step.seconds for step in steps if step.tflops is not None]
    return StepValues(
        iteration=newest.iteration,
        seconds=seconds,
        tokens=round(fmean(step.tokens for step in steps)),
        loss=fmean(losses) if losses else None,
        norm=fmean(norms) if norms else None,
        rates=newest.rates,
        tflops=fmean(work) / seconds if work and seconds > 0 else None,
        memory=newest.memory,
        violation=max((s.violation for s in steps if s.violation), default=None),
    )


def header(rates: Sequence[str], last: int) -> str:
    """The names over the columns of `step_line`."""
    many = len(rates) > 1
    names = [f"lr {name}" if many else "lr" for name in rates]
    return _aligned(
        ["iteration", "done", "loss", "norm", *names, "tokens/s", "TFLOP/s", "GiB", "MaxVio"],
        ["layer", "left"],
        last,
    )


def step_line(step: StepValues, last: int) -> str:
    """One line.

    Args:
        last: the number of the run's last step.
    """
    speed = step.tokens / step.seconds if step.seconds > 0 else None
    violation, layer = step.violation or (None, None)
    return _aligned(
        [
            f"{step.iteration}/{last}",
            f"{step.iteration / last:.1%}",
            "-" if step.loss is None else f"{step.loss:.4f}",
            digits(step.norm),
            *map(_rate, step.rates.values()),
            digits(speed),
            digits(step.tflops),
            digits(step.memory),
            digits(violation),
        ],
        ["-" if layer is None else str(layer), time_left((last - step.iteration) * step.seconds)],
        last,
    )


def _rate(value: float) -> str:
    return f"{value:.2e}".replace("e-0", "e-") if value else "0"


def _aligned(cells: Sequence[str], ends: Sequence[str], last: int) -> str:
    rates = len(cells) - 8
    widths = (max(2 * len(str(last)) + 1, 9), 6, 8, 8, *[8] * rates, 8, 8, 6, 6, 5, 9)
    columns = zip([*cells, *ends], widths, strict=True)
    return " " + " ".join(cell.rjust(width) for cell, width in columns)


def digits(value: float | None) -> str:
    """Three significant digits, with k, M or G for thousands."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5 or unit == "G":
            break
        value /= 1000
    if value != 0 and abs(value) < 0.01:
        return f"{value:.2e}{unit}"
    return f"{value:#.3g}".rstrip(".") + unit


def time_left(seconds: float) -> str:
    """Hours, minutes and seconds, and days where there are any."""
    whole = timedelta(seconds=round(seconds))
    clock = timedelta(seconds=whole.seconds)
    if whole.days == 0:
        return str(clock)
    return f"{whole.days}d {str(clock).rpartition(':')[0].rjust(5, '0')}"


def table_lines(title: str, rows: Mapping[str, str]) -> list[str]:
    """A table of two columns as plain lines; a long text goes on beneath itself."""
    wide = max(map(len, rows)) + 2
    lines = [title]
    for name, text in rows.items():
        parts = textwrap.wrap(text, WIDTH - wide - 2, break_on_hyphens=False) or [""]
        lines += [f"  {label:<{wide}}{part}" for label, part in zip([name], parts, strict=False)]
        lines += [f"  {'':<{wide}}{part}" for part in parts[1:]]
    return lines


def print_rows(title: str, rows: Mapping[str, str]) -> None:
    """Print such a table: drawn on a terminal, in plain lines elsewhere."""
    if sys.stdout.isatty():
        print_table(title, ("", ""), rows.items())
    else:
        print("\n".join(table_lines(title, rows)), flush=True)


STYLES = {"step": "", "header": "dim", "evaluated": "cyan", "saved": "green", "done": "bold"}


class StepConsole:
    """Prints the lines of one rank.

    Args:
        last: the number of the run's last step.
        interval: steps in a line; the first step of a process has one as well, and is in the
            next one, too.
        stream: standard output by default.
    """

    def __init__(self, last: int, interval: int, stream: TextIO | None = None) -> None:
        self._last, self._interval = last, interval
        self._stream = stream or sys.stdout
        self._steps: list[StepValues] = []
        self._lines, self._begun = 0, False
        self._bar: Progress | None = None

    def step(self, values: StepValues) -> None:
        """Take in a step, and print a line where one is due."""
        self._steps.append(values)
        due = values.iteration % self._interval == 0
        if due or not self._begun:
            mean = mean_of(self._steps)
            if self._lines % HEADER_EVERY == 0:
                self._print(header(list(mean.rates), self._last), "header")
            self._print(step_line(mean, self._last), "step")
            self._lines, self._begun = self._lines + 1, True
        if due:
            self._steps.clear()
        self._advance(values.iteration)

    def mark(self, kind: str, text: str) -> None:
        """Print what is no step."""
        self._print(f" -- {text}", kind)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, line: str, kind: str) -> None:
        if not self._stream.isatty():
            print(line, file=self._stream, flush=True)
            return
        from rich.text import Text

        self._drawn().console.print(Text(line, STYLES[kind]), soft_wrap=True)

    def _advance(self, iteration: int) -> None:
        if self._stream.isatty():
            bar = self._drawn()
            bar.update(bar.task_ids[0], completed=iteration, refresh=True)

    def _drawn(self) -> Progress:
        if self._bar is None:
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                console=Console(file=self._stream),
                auto_refresh=False,  # no thread beside the step
                transient=True,
            )
            self._bar.add_task("", total=self._last)
            self._bar.start()
            # The process may end without a chance to bring it back.
            self._bar.console.show_cursor(True)
        return self._bar
