"""What ranks with NVIDIA DALI are forked from."""

from __future__ import annotations

from pathlib import Path

from tests.dali.worker import PACKAGES, load_with_dali
from tests.distributed.pool import Kind
from tests.environments import packages


def dali_kind(python: Path) -> Kind:
    """With the packages of the interpreter of .venv-dali."""
    return Kind("tests.dali.preload", load_with_dali, {PACKAGES: str(packages(python))})
