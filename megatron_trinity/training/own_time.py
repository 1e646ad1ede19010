"""How long a rank works on a step by itself: the step's time without the waits in collectives.

Every step takes all ranks the same time, since they wait for the slowest. What tells them apart is
how long they wait. Any wait goes through torch's process groups, so these are timed, in the steps
that are measured: with the clock on a CPU, where a collective keeps its caller waiting, and with
events on the compute stream of a GPU, where it keeps the stream waiting. Sleeping, reading and
being slow are then a rank's own, as is what a host is too late to give its GPU.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist

PARTS = ("forward-backward", "optimizer", "data")
"""Of a step; `data` is the clock's time for reading, within the first."""

_STARTS = (
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier", "monitored_barrier"),
    *("allgather", "allgather_coalesced", "_allgather_base", "allgather_into_tensor_coalesced"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
    *("alltoall", "alltoall_base", "all_to_all_single", "all_gather_single"),
    *("all_gather_single_coalesced", "reduce_scatter_single", "reduce_scatter_single_coalesced"),
    *("gather", "scatter", "send", "recv", "recv_anysource", "_end_coalescing"),
)
"""Methods of a process group that may wait: each version of torch has most of them."""


class Clock(Protocol):
    """Marks points in time, whose distances are read later."""

    def mark(self) -> Any:
        """Now."""

    def seconds(self, first: Any, last: Any) -> float:
        """Between two marks; on a GPU both have to be over."""


class HostClock:
    """The clock of the machine."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, first: float, last: float) -> float:
        return last - first


class DeviceClock:
    """Events on the stream that work is being given to."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        milliseconds: float = first.elapsed_time(last)
        return milliseconds / 1e3


class OwnTime:
    """Measures a step when it is told to; between two of them nothing is timed."""

    def __init__(self, clock: Clock | None = None) -> None:
        """By default with the clock of the machine that the run is on."""
        self._clock = clock or (DeviceClock() if torch.cuda.is_available() else HostClock())
        self._timing = ExitStack()
        self._marks: list[Any] = []
        self._waits: list[tuple[int, Any, Any]] = []  # part, first, last
        self._reading = 0.0

    def begins(self) -> None:
        """A step that is measured begins."""
        self.forget()
        self._timing.enter_context(_timed_waits(self._waited))
        self._marks.append(self._clock.mark())

    def part_ends(self) -> None:
        """The part that is under way is over: forward and backward, then the optimizer."""
        if self._marks:
            self._marks.append(self._clock.mark())
        if len(self._marks) == len(PARTS):
            self._timing.close()

    def forget(self) -> None:
        """Leave the step out that is under way."""
        self._timing.close()
        self._marks, self._waits, self._reading = [], [], 0.0

    @contextmanager
    def until_the_end(self) -> Iterator[None]:
        """Time nothing any more behind this, wherever a step was left."""
        try:
            yield
        finally:
            self.forget()

    def read(self) -> list[float] | None:
        """Seconds by part of the step that has been measured; None if it came to no end.

        On a GPU all of it has to be over, as it is when a value of the step has been read.
        """
        if len(self._marks) < len(PARTS):
            return None
        pairs = zip(self._marks, self._marks[1:], strict=False)
        own = [self._clock.seconds(first, last) for first, last in pairs]
        for part, first, last in self._waits:
            own[part] -= self._clock.seconds(first, last)
        return [*own, self._reading]

    def reading[T](self, samples: Iterator[T] | None) -> Iterator[T] | None:
        """The same iterator, whose items are timed in a step that is measured."""
        return _Timed(samples, self._read_for) if samples is not None and self._marks else samples

    def _read_for(self, seconds: float) -> None:
        self._reading += seconds

    @contextmanager
    def _waited(self) -> Iterator[None]:
        part, first = len(self._marks) - 1, self._clock.mark()
        try:
            yield
        finally:
            self._waits.append((part, first, self._clock.mark()))


class _Timed[T]:
    def __init__(self, items: Iterator[T], tell: Callable[[float], None]) -> None:
        self._items, self._tell = items, tell

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        began = time.perf_counter()
        item = next(self._items)
        self._tell(time.perf_counter() - began)
        return item


@contextmanager
def _timed_waits(waiting: Callable[[], Any]) -> Iterator[None]:
    """Meanwhile call what may wait for other ranks within `waiting`."""
    found = [(dist.ProcessGroup, name) for name in _STARTS if hasattr(dist.ProcessGroup, name)]
    # As they stand in the class: looked up through it they come back as plain functions, which
    # are bound to no group when they are put back.
    before = [
        (owner, name, inspect.getattr_static(owner, name))
        for owner, name in [*found, (dist.Work, "wait")]
    ]
    for owner, name, original in before:
        setattr(owner, name, _within(waiting, original))
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


def _within(waiting: Callable[[], Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with waiting():
            return original(*args, **kwargs)

    return call
