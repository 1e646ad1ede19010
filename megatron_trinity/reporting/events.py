"""`events.jsonl`: what a run has done, a line an event, appended by one process after the other.

A line is written with one call, at once, by one rank: the last, which is the one that Megatron's
log is of. Only what ends a run is written by whichever rank knows of it. Nothing is ever taken
back: where a process goes on from an older iteration, `history.py` leaves out what was lost.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_trinity.reporting.schema import NAME


def run_folder(args: Namespace) -> Path | None:
    """Where a run keeps what is to be read when it has ended."""
    folder = args.run_dir or args.save or args.tensorboard_dir
    return None if folder is None else Path(folder)


class EventLog:
    """Appends to the file of a run.

    What goes wrong with the file is said once, and the run goes on: the file is a record of the
    run, not a part of it.

    Args:
        folder: of the run; is made.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.begun = False  # by the rank that writes
        self._lock = threading.Lock()  # a thread that watches writes as well
        self._file: int | None = None
        self._torn, self._missing, self._told = False, 0, False

    def write(self, event: Mapping[str, Any]) -> None:
        """Append one event, with the time."""
        with self._lock:
            try:
                if self._missing:
                    self._append({"kind": "gap", "events": self._missing})
                    self._missing = 0
                self._append(event)
            except OSError as error:
                self._missing += 1
                self._tell(error)

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _append(self, event: Mapping[str, Any]) -> None:
        stamped = {"kind": event["kind"], "time": round(time.time(), 3), **event}
        line = json.dumps(_finite(stamped), separators=(",", ":"), allow_nan=False) + "\n"
        data = line.encode()
        if self._file is None:
            self._open()
        assert self._file is not None
        if self._torn:
            data = b"\n" + data
        written = os.write(self._file, data)
        self._torn = written < len(data) and (written > 0 or self._torn)
        if written < len(data):  # of a disk that is full now; the next write says so
            raise OSError(28, "No space left on device")

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        # A process that was killed may have left half a line.
        size = os.fstat(self._file).st_size
        self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            print(
                f"WARNING: {self.path} cannot be written ({error.strerror}): the run goes on, and "
                "its events are missing there until it can",
                flush=True,
            )


def _finite(value: Any) -> Any:
    """`value` without the numbers that JSON does not know, which become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


_log: EventLog | None = None
_writes = False


@contextmanager
def logging_events(folder: Path | None, writes: bool) -> Iterator[None]:
    """Have `note` write into the run's file as long as this lasts.

    Args:
        folder: of the run; None for no file.
        writes: whether this rank is the one that writes.
    """
    global _log, _writes
    _log, _writes = (None if folder is None else EventLog(folder)), writes
    try:
        yield
    finally:
        log, _log = _log, None
        if log is not None:
            log.close()


def logs_events() -> bool:
    """Whether `note` writes, for a caller to whom an event costs something."""
    return _log is not None and _writes


def note(event: Mapping[str, Any]) -> None:
    """Write an event, such as `{"kind": "alarm", "what": "slow rank", ...}`.

    On the rank that writes; does nothing on the others, in a run without a folder, and before
    `start`: until its first step a process may be refused, and the folder another run's.
    """
    if _log is None or not _writes:
        return
    _log.begun |= event["kind"] == "start"
    if _log.begun:
        _log.write(event)


def note_from_here(event: Mapping[str, Any]) -> None:
    """Write an event that this rank alone knows of: to be called where the run ends with it."""
    if _log is not None:
        with suppress(Exception):  # the process is about to end for a better reason
            _log.write(event)


def alarm(what: str, line: str, iteration: int | None) -> None:
    """Note a warning about the run, which is printed elsewhere."""
    note({"kind": "alarm", "what": what, "iteration": iteration, "line": line})
