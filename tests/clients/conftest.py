"""The environment of vLLM, which is not the project's: its versions are others."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT


@pytest.fixture(scope="session")
def vllm_python(request: pytest.FixtureRequest) -> Path:
    """The interpreter of `.venv-vllm`, which is made first where it is absent or out of date."""
    command = 'source "$1/scripts/environment.sh" && prepare_vllm "$1"'
    # That takes minutes, and says what it does.
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        subprocess.run(["bash", "-c", command, "bash", ROOT], check=True, stdin=subprocess.DEVNULL)
    return ROOT / ".venv-vllm/bin/python"
