"""Xids of the last hours: what the driver has written into the kernel log about GPUs."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from megatron_trinity.command_line.node.finding import (
    NOT_HERE,
    Finding,
    Floors,
    answer_of,
    judged,
)

LINE = re.compile(r"^\[ *(\d+)\.\d+\].*NVRM: Xid \((?:PCI:)?([^)]+)\): (\d+)", re.MULTILINE)


def xid_finding(floors: Floors, uptime: float | None = None) -> Finding:
    """Those that are not of a program's own making.

    Args:
        uptime: seconds since the node was started, which the log counts in.
    """
    code, text = answer_of(("dmesg",))
    if code is None or code:
        last = text.strip().splitlines()[-1:] or ["dmesg tells nothing"]
        return Finding("Xids", NOT_HERE, last[0])
    if uptime is None:
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    since = uptime - 3600 * floors["xid_hours"]
    found = Counter(
        (place, int(number))
        for seconds, place, number in LINE.findall(text)
        if float(seconds) >= since and int(number) not in floors["xids_of_programs"]
    )
    words = ", ".join(f"{number} on {place} x{n}" for (place, number), n in found.items())
    return judged("Xids", not found, words or f"none in {floors['xid_hours']} hours")
