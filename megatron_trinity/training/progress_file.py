"""`--log-progress`: the file in `--save` that Megatron appends to, and reads at each save."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron_trinity.errors import UsageError

PROGRESS = "progress.txt"

_FIELDS = {"Saved checkpoint": 8, "Saving async checkpoint": 8}
"""What a line tells to the number of its fields, where that is more than four."""


def check_progress(args: Namespace) -> None:
    """Refuse a file of progress whose lines Megatron would stumble over, at the first save.

    A disk that was full, or a kill, may have left half a line.

    Raises:
        UsageError: which line it is.
    """
    path = Path(args.save or "") / PROGRESS
    if not (args.log_progress and args.save and path.exists()):
        return
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if not is_whole(line):
            raise UsageError(
                f"--log-progress goes on in {path}, whose line {number} is not whole; take the "
                "line out, or leave --log-progress out"
            )


def is_whole(line: str) -> bool:
    """Whether Megatron reads a line: time, job, number of GPUs, what happened, and figures."""
    fields = line.strip().split("\t")
    if len(fields) < 4 or len(fields) < _FIELDS.get(fields[3], 4):
        return False
    try:
        int(fields[2].split(": ")[1])
        if fields[3] in _FIELDS:
            float(fields[7].split(": ")[1])
    except (IndexError, ValueError):
        return False
    return True
