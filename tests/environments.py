"""Environments of their own, which some tests need and `scripts/environment.sh` makes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT


def prepared(request: pytest.FixtureRequest, name: str) -> Path:
    """The interpreter of `.venv-NAME`, which is made first where it is absent or out of date."""
    command = f'source "$1/scripts/environment.sh" && prepare_{name} "$1"'
    # That takes minutes, and says what it does.
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        subprocess.run(["bash", "-c", command, "bash", ROOT], check=True, stdin=subprocess.DEVNULL)
    return ROOT / f".venv-{name}/bin/python"


def packages(python: Path) -> Path:
    """The folder of the packages of an interpreter."""
    command = "import sysconfig; print(sysconfig.get_path('purelib'))"
    answer = subprocess.run([python, "-c", command], check=True, capture_output=True, text=True)
    return Path(answer.stdout.strip())
