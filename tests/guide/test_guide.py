"""The commands of the guide's first pages, as they stand there, one behind the other."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.guide.commands import blocks, commands
from tests.paths import ROOT

NAME = "tests/guide/test_guide.py::test_the_first_pages"
SOURCE = "--source documents"
SHORTER = {
    "--source python-stdlib": SOURCE,
    "--source DIR": SOURCE,
    "--vocab-size 8192": "--vocab-size 512",
    "--vocab-size 2048": "--vocab-size 512",
    "ITERATIONS=200": "ITERATIONS=4",
    "--train-iters 200": "--train-iters 2",
    "--lr-warmup-iters 20": "--lr-warmup-iters 1",
    "--lr-wsd-decay-iters 90": "--lr-wsd-decay-iters 2",
    "--lr-wsd-decay-iters 80": "--lr-wsd-decay-iters 1",
    "--save-interval 100": "--save-interval 2",
    "models/trinity-nano": "runs/quickstart/hf",
}
"""What makes minutes of training, and gigabytes of weights, into seconds."""

LEFT = {"README.md": "tests/run.sh"}
"""What of a page is not run here: the tests themselves."""


def shorter(text: str) -> str:
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    return text


def project(folder: Path) -> None:
    """The project in another place, whose runs and data are its own, with the Python of here."""
    for name in ("megatron_trinity", "tools", "benchmarks", "pretrain_trinity.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "megatron_trinity", folder / "documents", ignore=compiled)
    for name in ("examples", "scripts"):
        shutil.copytree(ROOT / name, folder / name)
    quickstart = folder / "examples/quickstart.sh"
    quickstart.write_text(shorter(quickstart.read_text()))
    # What it installs is here already.
    (folder / "scripts/environment.sh").write_text("prepare_environment() { :; }\n")


def lines() -> list[str]:
    """The commands of the blocks that name this test, each once."""
    found: dict[str, None] = {}
    for block in blocks():
        if NAME in block.run:
            left = LEFT.get(block.page)
            for words in commands(block.text):
                if left is None or left not in words:
                    found[shorter(shlex.join(words))] = None
    return list(found)


@pytest.mark.slow
def test_the_first_pages(tmp_path: Path) -> None:
    project(tmp_path)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    assert any("quickstart.sh" in line for line in lines())
    for line in lines():
        started = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        print(f"{time.monotonic() - started:.0f} s  {line}")
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert (tmp_path / "runs/quickstart/summary.json").is_file()
    assert (tmp_path / "runs/mine-hf/config.json").is_file()
