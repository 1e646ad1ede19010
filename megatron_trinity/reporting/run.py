"""A run as a reader sees it: columns over its steps, and what stands beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_trinity.errors import UsageError
from megatron_trinity.reporting.history import Event, read_history

Curve = tuple[np.ndarray, np.ndarray]
"""Iterations `[N]` and values `[N]`."""


class Run:
    """What `read_history` gives, by name.

    Attributes:
        name: of its folder, or of the one above where that is not told from others.
        history: all of it.
        iterations, seconds, tokens: of the steps, `[N]`; tokens are those up to the step.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """Raises: UsageError: it has no step yet, or no events at all."""
        self.folder, self.name = folder, name or folder.resolve().name
        self.history = read_history(folder)
        steps = self.history.steps
        if not steps or not self.history.starts:
            raise UsageError(f"{folder} has no step yet; wait for the first one")
        self.iterations = np.array([step["iteration"] for step in steps])
        self.seconds = np.array([step["seconds"] for step in steps])
        self.tokens = np.cumsum([step["tokens"] for step in steps])
        before = steps[0]["samples"] * self.start["tokens_per_sample"] - steps[0]["tokens"]
        self.tokens += max(0, int(before))  # of a run whose first events are elsewhere
        self.times = np.array([step["time"] for step in steps])

    @property
    def start(self) -> Event:
        """Of the newest process."""
        return self.history.starts[-1]

    @property
    def layers(self) -> list[int]:
        return list(self.start["layers"])

    def curve(self, name: str) -> Curve:
        """A value of the steps that have it."""
        found = [
            (step["iteration"], value)
            for step in self.history.steps
            if (value := step["values"].get(name)) is not None
        ]
        return _curve(found)

    def evaluations(self) -> Mapping[str, Curve]:
        """Validation loss by set."""
        found: dict[str, list[tuple[int, float]]] = {}
        for event in self.history.evaluations:
            value = event["values"].get("lm loss")
            if value is not None:
                kind = "test" if event["of_test"] else "validation"
                found.setdefault(f"{kind} {event['set']}".strip(), []).append(
                    (event["iteration"], value)
                )
        return {name: _curve(points) for name, points in found.items()}

    def violations(self) -> tuple[np.ndarray, np.ndarray]:
        """Iterations `[N]`, and MaxVio `[N, L]` of the steps that have it."""
        steps = [step for step in self.history.steps if step.get("max violation")]
        rows = [[np.nan if v is None else v for v in step["max violation"]] for step in steps]
        return np.array([step["iteration"] for step in steps]), np.array(rows, dtype=float)

    def arguments(self) -> dict[str, Any]:
        """All flags of the newest process."""
        return {
            f"--{name}": value
            for block in self.start["arguments"].values()
            for name, value in block.items()
        }


def open_runs(folders: list[Path]) -> list[Run]:
    """Several runs, by names that tell them apart."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = ["/".join(folder.resolve().parts[-2:]) for folder in folders]
    return [Run(folder, name) for folder, name in zip(folders, names, strict=True)]


def differences(runs: list[Run]) -> list[tuple[str, list[Any]]]:
    """Flags that are not the same in all runs, each with the values of all."""
    given = [run.arguments() for run in runs]
    names = sorted({name for of_run in given for name in of_run})
    rows = [(name, [of_run.get(name) for of_run in given]) for name in names]
    return [(name, values) for name, values in rows if any(v != values[0] for v in values)]


def _curve(points: list[tuple[int, float]]) -> Curve:
    iterations = np.array([iteration for iteration, _ in points], dtype=int)
    return iterations, np.array([value for _, value in points], dtype=float)
