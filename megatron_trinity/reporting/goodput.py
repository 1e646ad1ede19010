"""Where the time of a run went."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from megatron_trinity.reporting.history import Event, History

PARTS = ("training", "saving", "evaluating", "starting", "lost", "waiting", "other")
"""In this order: what counts, what belongs to it, and what does not.

`starting` is from the begin of a process to its first step; `lost`, what was done and repeated;
`waiting`, from the last event of a process to the begin of the next; `other`, what no event tells.
"""


def goodput(history: History) -> dict[str, float]:
    """Part to seconds; they add up to the time from the first launch to the last event."""
    parts = dict.fromkeys(PARTS, 0.0)
    if not history.starts:
        return parts
    parts["training"] = _seconds(history.steps)
    parts["saving"] = _seconds(history.saves)
    parts["evaluating"] = _seconds(history.evaluations)
    parts["lost"] = _seconds(history.lost)
    parts["starting"] = sum(max(0.0, e["time"] - e["launched"]) for e in history.starts)
    times = sorted(event["time"] for event in _all(history))
    begins = sorted(event["launched"] for event in history.starts)
    for _, begin in pairwise(begins):
        before = [time for time in times if time < begin]
        parts["waiting"] += begin - max(before, default=begin)
    whole = times[-1] - min(begins)
    parts["other"] = max(0.0, whole - sum(parts.values()))
    return parts


def _seconds(events: list[Event]) -> float:
    return sum(float(event.get("seconds") or 0.0) for event in events)


def _all(history: History) -> Iterator[Event]:
    for events in vars(history).values():
        if isinstance(events, list):
            yield from events
