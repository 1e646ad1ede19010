"""What the launcher does after a start, by the exit codes of ranks and the restarts it has left."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from megatron_trinity import exits
from tests.paths import ROOT


def outcome(words: str, **more: str) -> subprocess.CompletedProcess[str]:
    script = f"source '{ROOT}/scripts/outcome.sh'; {words}"
    given = {"PATH": "/usr/bin:/bin", **more}
    return subprocess.run(["bash", "-c", script], env=given, capture_output=True, text=True)


def test_every_exit_code_has_a_verdict() -> None:
    """`stop` of a code that is not listed would pass unseen, hence the list here."""
    expected = {
        "done": [exits.DONE],
        "never": [exits.USAGE, exits.BAD_STEP],
        "stop": [130, 143, exits.NOBODY_READS],
        "again": [
            *(exits.FAILED, exits.HUNG, exits.REWIND, exits.OUT_OF_TIME, exits.TOO_LATE),
            *(exits.PEER_LOST, exits.LAUNCHER_LOST, 138),
        ],
    }
    assert sorted(code for codes in expected.values() for code in codes) == sorted(exits.MEANINGS)
    pairs = [(code, verdict) for verdict, codes in expected.items() for code in codes]
    told = outcome("; ".join(f"verdict_of_code {code}" for code, _ in pairs))
    assert told.stdout.split() == [verdict for _, verdict in pairs]


def test_the_ranks_of_a_log_decide(tmp_path: Path) -> None:
    log = tmp_path / "node-0.log"

    def verdict(codes: list[int], told: str = "", **more: str) -> str:
        log.write_text("".join(f"  exitcode  : {code} (pid: 1)\n" for code in codes))
        return outcome(f"verdict_of '{told}' 1 {log}", **more).stdout.strip()

    assert verdict([-9, 8]) == "again: ranks ended with -9 8"
    assert verdict([8, 3]) == "stop: ranks ended with 3 8, and the next start would too"
    assert verdict([143]) == "stop: ranks ended with 143"
    assert verdict([8, 143]) == "again: ranks ended with 8 143"
    assert verdict([], "USR1", SLURM_JOB_ID="1") == "again: the time limit"
    assert verdict([3], "USR1", SLURM_JOB_ID="1").startswith("stop: ranks ended with 3")
    assert verdict([7], "TERM") == "stop: SIGTERM"
    assert verdict([]) == "again: the launcher ended with 1"


def test_restarts_without_progress_are_counted(tmp_path: Path) -> None:
    (tmp_path / "launches").mkdir()
    tracker = tmp_path / "latest_checkpointed_iteration.txt"

    def spend(before: int) -> subprocess.CompletedProcess[str]:
        return outcome(f"spend_restart {tmp_path} {before} 2")

    assert [spend(0).returncode for _ in range(2)] == [0, 0]
    tracker.write_text("40")
    assert spend(0).returncode == 0  # it has come to something: the count begins anew
    assert [spend(40).returncode for _ in range(2)] == [0, 0]
    last = spend(40)
    assert last.returncode == 1
    assert last.stderr.startswith(
        "error: 2 restarts in a row have come to no checkpoint behind iteration 40; the logs are in"
    )
    assert last.stderr.count("\n") == 1
    assert spend(40).returncode == 0  # a person has started it


TORCHRUN = """#!/bin/bash
# torchrun told to stop: it names no codes, and ends with its own.
trap 'echo {code} >"$MEGATRON_TRINITY_CODE_FILE"; exit 1' TERM
touch {mark}
while true; do sleep 0.05; done
"""


@pytest.mark.parametrize(("code", "expected"), [("143", 143), ("0", 1), ("", 1)])
def test_the_launcher_ends_with_the_code_of_the_trainer(
    tmp_path: Path, code: str, expected: int
) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "torchrun").write_text(TORCHRUN.format(code=code, mark=mark))
    (tmp_path / "torchrun").chmod(0o755)
    given = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    launcher = subprocess.Popen(
        ["bash", "scripts/launch.sh", "pretrain_trinity.py", "--save", str(tmp_path / "run")],
        cwd=ROOT,
        env={**given, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not mark.exists():
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.terminate()
    assert "launch 0: stop: SIGTERM" in launcher.communicate(timeout=60)[1]
    assert launcher.returncode == expected
