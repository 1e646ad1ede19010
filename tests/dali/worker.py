"""A rank that has NVIDIA DALI, and the real trainer."""

from __future__ import annotations

import os
import sys

from tests.distributed.worker import load_megatron

PACKAGES = "TRINITY_TEST_DALI_PACKAGES"
"""Variable with the folder of the packages of requirements/dali.txt."""


def load_with_dali() -> None:
    """As `load_megatron`. A rank, forked from this, calls it again."""
    # Behind the project's own packages, which win where both have one.
    if os.environ[PACKAGES] not in sys.path:
        sys.path.append(os.environ[PACKAGES])
    load_megatron()
