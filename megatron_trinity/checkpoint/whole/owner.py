"""A process as another one may know it, on this machine or not."""

from __future__ import annotations

import os
import platform
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A process that owns something.

    Attributes:
        host: its name, for people: two machines may have one.
        machine: within which its number says which process it is.
        pid: that number.
        started: tells it from a later process with that number.
        since: when it became the owner, by its own clock.
        id: tells it from all other owners, itself at another time among them.
    """

    host: str
    machine: str
    pid: int
    started: str
    since: str
    id: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def is_here(self) -> bool:
        """Whether this process could see it."""
        return self.machine == _machine()

    def is_running(self) -> bool:
        """Whether it has not ended; of one that `is_here`."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return _started(self.pid) in (self.started, None)


def this_process() -> Owner:
    """What others are told of this process."""
    now, pid = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"), os.getpid()
    return Owner(platform.node(), _machine(), pid, _started(pid) or "", now, uuid.uuid4().hex)


def _machine() -> str:
    """A boot and a name space of process numbers: containers may share all but the latter."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _started(pid: int) -> str | None:
    """When a process started, in ticks of the machine; "" if it has ended, None if unknown.

    The fields are those of proc(5), from the third on: the second may have blanks in it.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return "" if state in "ZX" else fields[18]
