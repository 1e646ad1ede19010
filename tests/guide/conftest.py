"""The environment that builds the site, which needs nothing of the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.environments import prepared


@pytest.fixture(scope="session")
def docs_python(request: pytest.FixtureRequest) -> Path:
    """The interpreter of `.venv-docs`."""
    return prepared(request, "docs")
