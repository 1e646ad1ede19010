"""A server that does not start says why, and leaves nothing; scripts stand for the server."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.clients import vllm_server
from tests.clients.vllm_server import serve


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def start(python: Path, work: Path) -> str:
    """What is said of a server that does not come up."""
    work.mkdir()
    with (
        pytest.raises(RuntimeError) as failed,
        serve(python, work / "model", work, "float32"),
    ):
        pass
    return str(failed.value)


def is_running(pid: int) -> bool:
    """Neither gone nor dead and unburied."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_one_that_ends_shows_the_end_of_its_log(tmp_path: Path) -> None:
    python = script(tmp_path / "python", 'seq 100; echo "no such model: $4" >&2; exit 3')
    lines = start(python, tmp_path / "work").splitlines()
    assert lines[0] == "vLLM ended with 3; the end of its log:"
    assert lines[1:] == [*map(str, range(42, 101)), f"no such model: {tmp_path}/work/model"]


def test_one_that_does_not_answer_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "START_LIMIT", 2)
    text = 'trap "" TERM; sleep 1000 & echo $!; echo $$; wait; sleep 1000'
    monkeypatch.setattr(vllm_server, "PATIENCE", 1)
    lines = start(script(tmp_path / "python", text), tmp_path / "work").splitlines()
    assert lines[0] == "vLLM is not up after 2 s; the end of its log:"
    processes = [int(line) for line in lines[1:]]
    assert len(processes) == 2
    deadline = time.monotonic() + 30  # of the kernel, to end what was killed
    while any(map(is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, processes))
