"""Errors as the user meets them: exit codes, one line, and which rank speaks."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_trinity import errors
from megatron_trinity.errors import TrinityError, UsageError, report_error, run_command
from tests.paths import ROOT


def run(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = (
        "from megatron_trinity import errors\n"
        "from megatron_trinity.errors import *\n"
        "errors.RANK_0_FIRST = 0\n"
        f"def main():\n    {body}\n"
        "run_command(main)\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "RANK"}
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("print('fine')", 0, ""),
        ("raise TrinityError('the run failed')", 1, "error: the run failed\n"),
        ("raise UsageError('no such flag')", 2, "error: no such flag\n"),
        ("raise KeyboardInterrupt", 130, ""),
    ],
    ids=["done", "failed", "usage", "interrupted"],
)
def test_exit_codes(body: str, code: int, stderr: str) -> None:
    done = run(body)
    assert (done.returncode, done.stderr) == (code, stderr)
    assert done.stdout == ("fine\n" if code == 0 else "")


def test_another_rank_says_which_it_is() -> None:
    done = run("raise UsageError('no such flag')", RANK="3")
    assert (done.returncode, done.stderr) == (2, "error on rank 3: no such flag\n")


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    done = run("raise ZeroDivisionError('a bug')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: a bug\n")


def test_rank_0_does_not_wait_and_the_others_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", waits.append)
    for rank, expected in (("0", []), ("1", [errors.RANK_0_FIRST])):
        waits.clear()
        monkeypatch.setenv("RANK", rank)
        report_error(TrinityError("x"))
        assert waits == expected
    assert capsys.readouterr().err == "error: x\nerror on rank 1: x\n"


def test_run_command_never_returns(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        run_command(lambda: None)
    assert done.value.code == 0
    assert capsys.readouterr() == ("", "")


def piped(command: str, code: str = "${PIPESTATUS[0]}") -> tuple[str, str]:
    """What a command line prints, with its exit code in the end, and its errors."""
    done = subprocess.run(
        ["bash", "-c", f"{command}; echo {code}"],
        cwd=ROOT,
        env={name: os.environ[name] for name in os.environ.keys() - {"RANK", "PYTHONUNBUFFERED"}},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr


HERE, PYTHON = shlex.quote(str(ROOT)), shlex.quote(sys.executable)
SOURCE = "from megatron_trinity.errors import *\n"


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("[print('x' * 99) for _ in range(99999)]", 141, ""),
        ("import time; time.sleep(0.5); print('little')", 141, ""),
        (
            "import time; time.sleep(0.5); print('x'); raise TrinityError('not whole')",
            1,
            "error: not whole\n",
        ),
        ("raise SystemExit(0)", 0, ""),
    ],
    ids=["much", "little", "an error", "nothing"],
)
def test_nobody_reads(body: str, code: int, stderr: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(f"{SOURCE}def main():\n    {body}\nrun_command(main)\n")
    command = f"PYTHONPATH={HERE} {PYTHON} {program} | true"
    assert piped(command) == (f"{code}\n", stderr)


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_the_help_of_each_tool_is_read_in_part(script: str) -> None:
    out, err = piped(f"{PYTHON} tools/{script} --help | true")
    assert (out in ("0\n", "141\n"), err) == (True, "")


def test_another_pipe_that_breaks_is_a_fault() -> None:
    done = run("raise BrokenPipeError('of a worker')")
    assert done.returncode == 1
    assert done.stderr.endswith("BrokenPipeError: of a worker\n")


def test_a_rank_whose_output_nobody_reads_says_so(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    body = "[print('x' * 99) for _ in range(99999)]"
    program.write_text(f"{SOURCE}def main():\n    {body}\nrun_command(main)\n")
    out, err = piped(f"RANK=0 PYTHONPATH={HERE} {PYTHON} {program} | true")
    line = "error: nobody reads the output any more; use a file for it\n"
    assert (out, err) == ("141\n", line)


def test_usage_errors_are_trinity_errors() -> None:
    assert issubclass(UsageError, TrinityError)
    assert (TrinityError.exit_code, UsageError.exit_code) == (1, 2)
