"""Python processes of the suite, each with its output in a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT


def why_failed(words: list[str], output: Path, seconds: float | None = None) -> str | None:
    """Run Python with these words; None, or what it says of its failure in a line.

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
            return f"not done after {seconds} s"
    if code == 0:
        return None
    return last_line(output.read_text(errors="replace")) or f"exit code {code}"


def last_line(text: str) -> str:
    """Of what a process has printed: what it says of its error, or what it said last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return [*errors[:1], *lines[-1:], ""][0][:300]
