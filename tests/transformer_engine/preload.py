"""As `tests.distributed.preload`, with Transformer Engine."""

import contextlib
import gc

from tests.transformer_engine.worker import load_emulated

with contextlib.suppress(Exception):
    load_emulated()
gc.collect()
gc.freeze()
