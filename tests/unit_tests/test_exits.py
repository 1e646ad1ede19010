"""The exit codes of training: as the guide has them, and where a launcher reads them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_trinity import exits
from megatron_trinity.errors import Stopped, run_command
from tests.paths import ROOT


def test_the_guide_has_them() -> None:
    page = (ROOT / "docs/faults.md").read_text()
    section = page.partition("## Exit codes\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", section, re.MULTILINE)
    assert [(int(code), meaning) for code, meaning in rows] == sorted(exits.MEANINGS.items())


@pytest.mark.parametrize("rank", ["0", "1"])
def test_rank_0_writes_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    monkeypatch.setenv(exits.CODE_FILE, str(tmp_path / "code"))
    monkeypatch.setenv("RANK", rank)

    def main() -> None:
        raise Stopped("", 143)

    with pytest.raises(SystemExit, match="143"):
        run_command(main)
    assert [path.read_text() for path in tmp_path.iterdir()] == (["143\n"] if rank == "0" else [])


def test_a_file_that_cannot_be_written_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(exits.CODE_FILE, str(tmp_path / "no such directory/code"))
    with pytest.raises(SystemExit, match="0"):
        run_command(lambda: None)


ENDS = """
import atexit, sys, threading, time
from megatron_trinity.exits import end

class Taken:
    def __del__(self):
        print("taken apart")

taken = Taken()
atexit.register(print, "registered")
threading.Thread(target=lambda: (time.sleep(0.2), print("waited for"))).start()
sys.stdout.write("written, ")
end(8)
"""


def test_an_end_does_all_but_to_take_the_interpreter_apart() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ENDS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (8, "")
    assert ended.stdout == "written, waited for\nregistered\n"
