"""Python processes of the suite, each with its output in a file."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_trinity.exits import USAGE
from tests.paths import ROOT

ERROR = "error:"


@dataclass(frozen=True)
class Failure:
    """How a process failed.

    Attributes:
        told: what it says of it, in a line.
        refused: at start, by name: this machine cannot do what was asked for.
    """

    told: str
    refused: bool = False


def failure_of(words: list[str], output: Path, seconds: float | None = None) -> Failure | None:
    """Run Python with these words; None, or how it failed.

    Args:
        output: file of what it prints.
        seconds: that it may take.
    """
    with output.open("w") as stream:
        try:
            code = subprocess.run(
                [sys.executable, *words],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            ).returncode
        except subprocess.TimeoutExpired:
            return Failure(f"not done after {seconds} s")
    if code == 0:
        return None
    told = last_line(output.read_text(errors="replace")) or f"exit code {code}"
    return Failure(told, refused=code == USAGE and told.startswith(ERROR))


def last_line(text: str) -> str:
    """Of what a process has printed: what it says of its error, or what it said last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(ERROR)]
    return [*errors[:1], *lines[-1:], ""][0][:300]
