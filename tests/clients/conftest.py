"""The environments of clients, which are not the project's: their versions are others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.environments import prepared


@pytest.fixture(scope="session")
def vllm_python(request: pytest.FixtureRequest) -> Path:
    """The interpreter of `.venv-vllm`."""
    return prepared(request, "vllm")


@pytest.fixture(scope="session")
def clients_python(request: pytest.FixtureRequest) -> Path:
    """The interpreter of `.venv-clients`."""
    return prepared(request, "clients")
