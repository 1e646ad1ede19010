"""Transformer Engine's Python modules over their emulation, at toy size: those of `.venv-te`."""

from __future__ import annotations

import os

from tests.paths import ROOT
from tests.transformer_engine.worker import PACKAGES


def find_emulated() -> bool:
    """Whether they are there; this process and its children are told where."""
    packages = sorted(ROOT.glob(".venv-te/lib/python*/site-packages/transformer_engine"))
    if packages:
        os.environ[PACKAGES] = str(packages[-1].parent)
    return bool(packages)
