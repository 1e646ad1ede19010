"""Events of a run: one line each, whole after any end, and once each for a reader."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_trinity.errors import UsageError
from megatron_trinity.reporting import events
from megatron_trinity.reporting.events import EventLog, logging_events, note, note_from_here
from megatron_trinity.reporting.history import history, read_history
from megatron_trinity.reporting.schema import KINDS, NAME, SCHEMA


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()]


def test_a_line_is_json_with_a_time(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "new" / "run")
    log.write({"kind": "step", "iteration": 1, "values": {"lm loss": float("nan"), "x": (1.5, 2)}})
    log.close()
    [event] = lines(tmp_path / "new" / "run")
    assert event.pop("time") > 1e9
    assert event == {"kind": "step", "iteration": 1, "values": {"lm loss": None, "x": [1.5, 2]}}


def test_half_a_line_of_a_killed_process_costs_no_other(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"kind":"alarm","iteration":1}\n{"kind":"al')
    log = EventLog(tmp_path)
    log.write({"kind": "alarm", "iteration": 2})
    log.close()
    found = read_history(tmp_path)
    assert [event["iteration"] for event in found.alarms] == [1, 2]
    assert found.unread == 1


def test_a_full_disk_is_said_once_and_the_gap_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, room = os.write, [10**6]

    def on_a_small_disk(file: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        part = data[: room[0]]
        room[0] -= len(part)
        return write(file, part)

    monkeypatch.setattr(events.os, "write", on_a_small_disk)
    log = EventLog(tmp_path)
    log.write({"kind": "alarm", "iteration": 1})
    room[0] = 12
    for number in (2, 3):
        log.write({"kind": "alarm", "iteration": number})
    room[0] = 10**6
    log.write({"kind": "alarm", "iteration": 4})
    log.close()
    found = read_history(tmp_path)
    assert [event["iteration"] for event in found.alarms] == [1, 4]
    assert (found.missing, found.unread) == (2, 1)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(
        f"WARNING: {tmp_path / NAME} cannot be written (No space left on device)"
    )


def test_a_folder_that_cannot_be_made_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    log = EventLog(tmp_path / "file" / "run")
    log.write({"kind": "alarm"})
    log.write({"kind": "alarm"})
    assert capsys.readouterr().out.count("cannot be written (Not a directory)") == 1


def test_only_the_rank_that_writes_notes(tmp_path: Path) -> None:
    note({"kind": "alarm"})  # outside of a run
    with logging_events(tmp_path, writes=False):
        note({"kind": "alarm", "what": "a"})
        note_from_here({"kind": "end", "code": 4})
    with logging_events(tmp_path, writes=True):
        note({"kind": "alarm", "what": "of a process that may be refused"})
        note(start(0))
        note({"kind": "alarm", "what": "b"})
    with logging_events(None, writes=True):
        note({"kind": "alarm", "what": "c"})
    assert [event.get("what", event["kind"]) for event in lines(tmp_path)] == ["end", "start", "b"]


def start(iteration: int, schema: int = SCHEMA) -> dict[str, Any]:
    return {"kind": "start", "schema": schema, "iteration": iteration}


def step(iteration: int, loss: float, kind: str = "step") -> dict[str, Any]:
    return {"kind": kind, "iteration": iteration, "values": {"lm loss": loss}}


def read(written: Sequence[dict[str, Any]]) -> Any:
    return history(json.dumps(event) for event in written)


def test_steps_that_were_lost_are_taken_out() -> None:
    found = read(
        [
            start(0),
            *(step(n, 1.0) for n in (1, 2, 3)),
            step(2, 1.0, "save"),
            step(3, 1.0, "evaluation"),
            {"kind": "alarm", "iteration": 3},
            start(2),
            *(step(n, 2.0) for n in (3, 4)),
            step(4, 2.0, "evaluation"),
            step(4, 3.0, "evaluation"),
            start(4),
            step(5, 3.0),
            {"kind": "end", "code": 0, "iteration": 5},
        ]
    )
    steps = [(event["iteration"], event["values"]["lm loss"]) for event in found.steps]
    assert steps == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 3.0)]
    assert [(e["iteration"], e["values"]["lm loss"]) for e in found.evaluations] == [(4, 3.0)]
    assert [event["iteration"] for event in found.saves] == [2]
    assert [(e["kind"], e["iteration"]) for e in found.lost] == [("step", 3), ("evaluation", 3)]
    assert len(found.starts) == 3
    assert len(found.alarms) == len(found.ends) == 1


def test_a_newer_schema_is_refused() -> None:
    with pytest.raises(UsageError, match=f"schema {SCHEMA + 1}"):
        read([start(0, SCHEMA + 1)])


def test_no_file_says_where_it_would_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--run-dir"):
        read_history(tmp_path)


def test_every_kind_is_described() -> None:
    assert all(kind.when and all(kind.fields.values()) for kind in KINDS.values())


def test_an_event_of_ranks_has_the_fields_of_the_table() -> None:
    from megatron_trinity.training.slow_ranks import RankTimes, event

    times = RankTimes(5, [[1.0, 0.5, 0.1], [2.0, 0.5, 0.1]], [0, 0], ["a", "b"])
    assert set(event(times)) == {"kind", *KINDS["ranks"].fields}
