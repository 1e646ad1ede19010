"""Disks that a run writes to: room, a file that comes back as written, and the clock."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from megatron_trinity.command_line.node.finding import Finding, Floors, judged


def disk_findings(path: Path, floors: Floors) -> list[Finding]:
    """Of one directory; the clock is compared with that of the disk's server."""
    subject, data = f"disk {path}", os.urandom(1 << 20)
    probe = path / f".check-{os.uname().nodename}-{os.getpid()}.tmp"
    try:
        free = shutil.disk_usage(path).free / 1e9
        try:
            with open(probe, "wb") as file:
                file.write(data)
                os.fsync(file.fileno())
                now = time.time()
            apart = abs(probe.stat().st_mtime - now)
            same = probe.read_bytes() == data
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        return [judged(subject, False, str(error))]
    enough = free >= floors["disk_free_gb"]
    what = "" if same else "; what was written did not come back"
    words = f"{free:.0f} GB free, at least {floors['disk_free_gb']}{what}"
    return [
        judged(subject, enough and same, words),
        judged(
            f"clock of {path}",
            apart <= floors["clock_seconds"],
            f"{apart:.2f} s apart, at most {floors['clock_seconds']}",
        ),
    ]
