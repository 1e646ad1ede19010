"""What is left of a run's events when those of steps that were lost are taken out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_trinity.errors import UsageError
from megatron_trinity.reporting.schema import NAME, SCHEMA

Event = Mapping[str, Any]

OF_STEPS = ("step", "loads", "data", "ranks", "evaluation", "save")
"""Kinds that are done again where a process goes on from before them."""


@dataclass
class History:
    """Events by kind, in the order in which they were written.

    `steps`, `loads`, `data`, `ranks`, `evaluations` and `saves` have an iteration once: the newest,
    and none that a later process has gone back behind. `starts`, `alarms` and `ends` are all there
    are.

    Attributes:
        lost: what was taken out, of all kinds.
        missing: events that could not be written.
        unread: lines that are no event, such as half a line of a process that was killed.
    """

    starts: list[Event] = field(default_factory=list)
    steps: list[Event] = field(default_factory=list)
    loads: list[Event] = field(default_factory=list)
    data: list[Event] = field(default_factory=list)
    ranks: list[Event] = field(default_factory=list)
    evaluations: list[Event] = field(default_factory=list)
    saves: list[Event] = field(default_factory=list)
    alarms: list[Event] = field(default_factory=list)
    ends: list[Event] = field(default_factory=list)
    lost: list[Event] = field(default_factory=list)
    missing: int = 0
    unread: int = 0


def read_history(run: Path) -> History:
    """The events of a run.

    Args:
        run: its folder, or the file itself.

    Raises:
        UsageError: there is none, or it is of a newer version.
    """
    path = run / NAME if run.is_dir() else run
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            return history(lines)
    except FileNotFoundError as error:
        raise UsageError(
            f"{path} is not there; give the folder of a run: its --run-dir, --save or "
            "--tensorboard-dir"
        ) from error


def history(lines: Iterable[str]) -> History:
    """Of the lines of a file.

    Raises:
        UsageError: they are of a newer version.
    """
    found = History()
    kept: list[Event] = []
    for line in lines:
        event = _event(line)
        if event is None:
            found.unread += bool(line.strip())
            continue
        kind = event["kind"]
        if kind == "start":
            if event.get("schema", 0) > SCHEMA:
                raise UsageError(
                    f"these events are of schema {event['schema']}, and this program reads "
                    f"{SCHEMA}; use the version that wrote them"
                )
            found.starts.append(event)
            found.lost += [one for one in kept if one["iteration"] > event["iteration"]]
            kept = [one for one in kept if one["iteration"] <= event["iteration"]]
        elif kind in OF_STEPS:
            kept.append(event)
        elif kind == "alarm":
            found.alarms.append(event)
        elif kind == "end":
            found.ends.append(event)
        elif kind == "gap":
            found.missing += event["events"]
    of_steps = (found.steps, found.loads, found.data, found.ranks, found.evaluations, found.saves)
    lists = dict(zip(OF_STEPS, of_steps, strict=True))
    # An evaluation of the same step twice, as behind the last one, is said once: the newest.
    newest = {(e["kind"], e["iteration"], e.get("set"), e.get("of_test")): e for e in kept}
    for event in newest.values():
        lists[event["kind"]].append(event)
    return found


def _event(line: str) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "kind" in event else None
