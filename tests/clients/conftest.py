"""The environments of clients, which are not the project's: their versions are others."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT


@pytest.fixture(scope="session")
def vllm_python(request: pytest.FixtureRequest) -> Path:
    """The interpreter of `.venv-vllm`, which is made first where it is absent or out of date."""
    return prepared(request, "vllm")


@pytest.fixture(scope="session")
def clients_python(request: pytest.FixtureRequest) -> Path:
    """The interpreter of `.venv-clients`, made alike."""
    return prepared(request, "clients")


def prepared(request: pytest.FixtureRequest, name: str) -> Path:
    command = f'source "$1/scripts/environment.sh" && prepare_{name} "$1"'
    # That takes minutes, and says what it does.
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        subprocess.run(["bash", "-c", command, "bash", ROOT], check=True, stdin=subprocess.DEVNULL)
    return ROOT / f".venv-{name}/bin/python"
