"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Protocol, Self, TextIO

_SECONDS_BETWEEN_LINES = 5.0


class Progress(Protocol):
    """A context within which `update` is told how much is done so far, and what else to say."""

    def update(self, done_bytes: int, note: str = "") -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class SilentProgress:
    """Shows nothing: for callers that are not command lines."""

    def __init__(self, total_bytes: int | None = None) -> None:
        self.total_bytes = total_bytes

    def update(self, done_bytes: int, note: str = "") -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


class LineProgress(SilentProgress):
    """Prints a line every few seconds."""

    def __init__(
        self,
        total_bytes: int | None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(total_bytes)
        self._stream = stream or sys.stderr
        self._clock = clock
        self._started = self._printed = clock()

    def update(self, done_bytes: int, note: str = "") -> None:
        now = self._clock()
        if now - self._printed < _SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        rate = done_bytes / (now - self._started)
        words = [note] if note else []
        words.append(f"{done_bytes / 1e6:,.1f} MB")
        if self.total_bytes:
            words[-1] += f" ({done_bytes / self.total_bytes:.0%})"
        words.append(f"{rate / 1e6:.1f} MB/s")
        if self.total_bytes and rate > 0:
            left = max(0.0, self.total_bytes - done_bytes) / rate
            words.append(f"{timedelta(seconds=round(left))} left")
        print(", ".join(words), file=self._stream, flush=True)


class BarProgress(SilentProgress):
    """Draws a bar on a terminal (on stderr)."""

    def __init__(self, total_bytes: int | None) -> None:
        from rich import progress
        from rich.console import Console

        super().__init__(total_bytes)
        self._bar = progress.Progress(
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TextColumn("{task.fields[note]}"),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=total_bytes, note="")

    def update(self, done_bytes: int, note: str = "") -> None:
        self._bar.update(self._task, completed=done_bytes, note=note)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self.total_bytes is not None:  # files left out never were counted
            self._bar.update(self._task, completed=self.total_bytes)
        self._bar.stop()


def progress_for_terminal(total_bytes: int | None) -> Progress:
    """A bar where stderr is a terminal, lines where it is not."""
    return BarProgress(total_bytes) if sys.stderr.isatty() else LineProgress(total_bytes)
