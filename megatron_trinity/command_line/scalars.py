"""What a run has written for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

Scalars = Mapping[str, Mapping[int, float]]
"""Name in the log to step to value."""


def read_scalars(directory: Path) -> Scalars:
    """All that TensorBoard's files have; of several runs, the last value of a step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }
