"""Imported by the fork server alone: leaves it with all that a rank needs, adapted and loaded.

A rank does the same again, which costs nothing when it was done here, and can report what failed.
"""

import contextlib
import gc

from tests.distributed.worker import load_megatron

with contextlib.suppress(Exception):
    load_megatron()
# Collections in the ranks then leave these pages alone, and they stay shared.
gc.collect()
gc.freeze()
