"""Being told to stop: by a signal, or by the end of the launcher.

A signal is noted, and training leaves when all ranks know of it (`leaving.py`). Until the first
step there is nothing to save, and the process leaves at once (`following.py`: the others with it).
A thread sees to it that it leaves in time, wherever the main thread waits. This file imports no
torch: it is there before that is.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from megatron_trinity import exits
from megatron_trinity.errors import Stopped
from megatron_trinity.reporting.events import note

WITHIN, AT_START = 120.0, 5.0
"""Seconds from a signal to the end of the process: by default, and before the first step."""

LOOK = 0.5
"""Seconds between two looks at the clock and at the launcher."""


@dataclass(frozen=True)
class Reason:
    """Why a run leaves: in words, and with what exit code."""

    words: str
    code: int


LAUNCHER = Reason("the end of its launcher", exits.LAUNCHER_LOST)
DURATION = Reason("--exit-duration-in-mins", exits.OUT_OF_TIME)


def by_signal(number: int) -> Reason:
    return Reason(signal.Signals(number).name, exits.of_signal(number))


class Stop:
    """What has told this process to stop, and how long it may take.

    Attributes:
        reasons: all that there may be, the weightiest first; the same on every rank.
        pending: those that this process has met.
        within: seconds that it has, once training has begun.
        has_begun: whether it has.
        since: when it was first told, by the monotonic clock; None if it was not.
    """

    def __init__(self) -> None:
        self.signals = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        self.pending: set[Reason] = set()
        self.within = WITHIN
        self.since: float | None = None
        self.has_begun = False
        self._deferred, self._asks, self._raised, self._times = False, False, False, 0
        self._told = threading.Event()
        self._before: dict[int, object] = {}
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._closed = False
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._thread = threading.Thread(target=self._live, name="stop", daemon=True)

    @property
    def reasons(self) -> Sequence[Reason]:
        return (*map(by_signal, self.signals), LAUNCHER, DURATION)

    def open(self) -> None:
        """Take the signals; from the main thread."""
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in self.signals:
            self._before[number] = signal.signal(number, self._handle)
        self._thread.start()

    def close(self) -> None:
        """Give the signals back."""
        self._closed = True
        os.write(self._writer, b"\0")
        self._thread.join()
        signal.set_wakeup_fd(self._wakeup)
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]
        os.close(self._reader)
        os.close(self._writer)

    def also(self, number: signal.Signals) -> None:
        """Take one more signal."""
        if number not in self.signals:
            self.signals.append(number)
            self._before[number] = signal.signal(number, self._handle)

    def training_begins(self, agreed: Callable[[], Reason | None]) -> None:
        """From now on there is something to save: signals wait for the end of a step.

        Args:
            agreed: has all ranks agree on whether one was told so far.

        Raises:
            Stopped: one was; on every rank.
        """
        self._asks = True  # no rank leaves alone any more
        if (reason := agreed()) is not None:
            raise self.before_the_first_step(reason)
        self.has_begun = True

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let what is written here be written to its end, before the process leaves."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.raise_pending()

    def raise_pending(self) -> None:
        if self.pending and not (self.has_begun or self._asks or self._raised):
            self._raised = True
            raise self.before_the_first_step(self.first)

    def before_the_first_step(self, reason: Reason) -> Stopped:
        return Stopped(
            f"stopped by {reason.words} before the first step; nothing was written", reason.code
        )

    def hear(self, reason: Reason) -> None:
        """Leave since another rank was told to; from any thread."""
        number = next((n for n in self.signals if by_signal(n) == reason), None)
        if number is None:
            self._note(reason)
        else:  # as if it had come here, which the main thread hears wherever it can
            os.kill(os.getpid(), number)

    @property
    def first(self) -> Reason:
        return next(reason for reason in self.reasons if reason in self.pending)

    def wait(self, seconds: float) -> bool:
        """Sleep so long, but no longer than until this process is told to stop; whether it is."""
        return self._told.wait(seconds)

    def _handle(self, number: int, _: FrameType | None) -> None:
        # The thread counts; here is what only the main thread can do.
        self.pending.add(by_signal(number))
        if not self._deferred:
            self.raise_pending()

    def _live(self) -> None:
        while True:
            ready, _, _ = select.select([self._reader], [], [], LOOK)
            numbers = os.read(self._reader, 64) if ready else b""
            if self._closed:
                return
            for number in numbers:
                if number in self.signals:
                    self._note(by_signal(number))
            if self._parent is not None and os.getppid() != self._parent:
                self._parent = None
                self._note(LAUNCHER)
            self._look_at_the_clock()

    def _note(self, reason: Reason) -> None:
        self._times += reason == by_signal(signal.SIGINT)
        gone = reason == LAUNCHER and by_signal(signal.SIGINT) in self.pending
        if self._times > 1 or gone:  # a second Ctrl-C ends torchrun, and reaches no rank
            leave("interrupted twice: this run leaves at once", exits.of_signal(signal.SIGINT))
        self.pending.add(reason)
        self.since = self.since or time.monotonic()
        self._told.set()

    def _look_at_the_clock(self) -> None:
        if self.since is None:
            return
        may_take = self.within if self.has_begun or self._deferred else min(AT_START, self.within)
        if time.monotonic() - self.since < may_take:
            return
        if not self.has_begun:
            leave(f"stopped by {self.first.words} before the first step", self.first.code)
        leave(
            f"error: not saved within {may_take:g} s of {self.first.words}; the newest whole "
            "checkpoint stays; see --exit-within",
            exits.TOO_LATE,
        )


_current: Stop | None = None


@contextmanager
def stopping() -> Iterator[Stop]:
    """Take signals as long as this lasts; within another one, that one."""
    global _current
    if _current is not None:
        yield _current
        return
    _current = Stop()
    _current.open()
    try:
        yield _current
    finally:
        stop, _current = _current, None
        stop.close()


def leave(line: str, code: int) -> NoReturn:
    """End the process now, whatever its threads wait for."""
    note({"kind": "end", "iteration": None, "code": code, "line": line})
    with suppress(Exception):
        rank = os.environ.get("RANK", "0")
        if line:
            print(line if rank == "0" else f"rank {rank}: {line}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    exits.tell(code)
    os._exit(code)


def _forget() -> None:
    """In a fork: what is sent to all processes of a job is for the trainer alone."""
    global _current
    if _current is not None:
        signal.set_wakeup_fd(-1)
        for number in _current.signals:
            signal.signal(number, signal.SIG_IGN)
        _current = None


os.register_at_fork(after_in_child=_forget)
