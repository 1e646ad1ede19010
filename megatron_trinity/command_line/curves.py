"""Runs whose curves a benchmark compares: whether they are done, their figures, a picture of them.

A run is a folder with `command.txt`, its flags, and `tensorboard`, what it has written.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_trinity.command_line.scalars import Scalars, read_scalars

LOSS, VALIDATION_LOSS = "lm loss", "lm loss validation"
TAIL = 50
"""Steps at the end that a figure is the mean of."""
SMOOTHING = 10
"""Steps that a point of a smooth line is the mean of; of a short run half of them, for a line."""


def note_flags(run: Path, flags: Sequence[str]) -> None:
    """Say what the run is, for `is_done`."""
    (run / "command.txt").write_text(shlex.join(flags))


def is_done(run: Path, flags: Sequence[str], steps: int, last: str = VALIDATION_LOSS) -> bool:
    """Whether the run with these very flags has come to its end.

    Args:
        last: what it writes behind its last step.
    """
    command = run / "command.txt"
    if not command.exists() or command.read_text() != shlex.join(flags):
        return False
    return steps in scalars_of(run).get(last, {})


def scalars_of(run: Path) -> Scalars:
    """What the run has written."""
    return read_scalars(run / "tensorboard")


def tail_mean(steps: Mapping[int, float]) -> float:
    """Of the last `TAIL` steps."""
    values = list(steps.values())[-TAIL:]
    return sum(values) / len(values)


def running_mean(curve: Mapping[int, float]) -> dict[int, float]:
    """Step to the mean of it and of those ahead of it, `SMOOTHING` in all."""
    steps, values = list(curve), list(curve.values())
    width = max(1, min(SMOOTHING, len(values) // 2))
    return {
        steps[end - 1]: sum(values[end - width : end]) / width
        for end in range(width, len(values) + 1)
    }


def points(curve: Mapping[int, float]) -> tuple[list[int], list[float]]:
    """Where a curve is drawn: along, and up."""
    return list(curve), list(curve.values())


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    whole = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in whole)


def add_figure_argument(parser: argparse.ArgumentParser, of: str) -> None:
    """Add `--figure`, a picture of what `of` says."""
    parser.add_argument("--figure", type=_figure, help=f"also draw {of}, as .svg or .png")


def _figure(text: str) -> Path:
    if Path(text).suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"{text} has to end in .svg or .png")
    return Path(text)


def pyplot(salt: str) -> Any:
    """matplotlib's, without a screen; `salt` makes the same values the same file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": 11}
    import matplotlib.pyplot as plt

    return plt


def finish(axes: Any) -> None:
    """A light grid, and no frame above and on the right."""
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def save(canvas: Any, figure: Path) -> None:
    """Write a picture."""
    figure.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if figure.suffix == ".svg" else None
    canvas.savefig(figure, dpi=110, metadata=metadata)
