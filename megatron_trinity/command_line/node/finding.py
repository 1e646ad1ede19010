"""What a part of the check has found."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OK, BAD, NOT_HERE = "ok", "bad", "not here"
SECONDS = 60.0
"""How long a command may take: a driver that hangs is a bad node."""

Floors = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """Attributes:
    subject: what was looked at.
    status: `ok`, `bad`, or `not here`: it cannot be looked at on this node.
    words: what was found, and what it has to reach.
    of_gpu: it is about GPUs, which a node may be required to have; not about several where
        there is one.
    """

    subject: str
    status: str
    words: str
    of_gpu: bool = False


def judged(subject: str, good: bool, words: str, *, of_gpu: bool = False) -> Finding:
    return Finding(subject, OK if good else BAD, words, of_gpu)


def answer_of(command: Sequence[str]) -> tuple[int | None, str]:
    """A command's exit code and its output; None where there is no such command.

    One that does not end in time has code 124.
    """
    try:
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            env=os.environ | {"LC_ALL": "C"},
        )
    except FileNotFoundError:
        return None, f"{command[0]} is not installed"
    except subprocess.TimeoutExpired:
        return 124, f"{command[0]} does not answer within {SECONDS:g} s"
    return ended.returncode, ended.stdout if ended.returncode == 0 else ended.stderr or ended.stdout


def of_device(floors: Floors, name: str) -> Floors:
    """The floors of a device by its name; none where it is not listed."""
    known = floors["devices"].items()
    return next((values for part, values in known if part in name), {})
