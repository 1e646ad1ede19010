"""As `tests.distributed.preload`, with NVIDIA DALI to be found."""

import contextlib
import gc

from tests.dali.worker import load_with_dali

with contextlib.suppress(Exception):
    load_with_dali()
gc.collect()
gc.freeze()
