"""W&B's own errors at the start of a run, such as that nobody has logged in, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_trinity.errors import TrinityError


@contextmanager
def telling_wandb() -> Iterator[None]:
    """Turn an error of W&B's inside the block into a `TrinityError`; the package may be absent."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("wandb"):
            raise
        said = " ".join(str(error).split()).rstrip(".")
        raise TrinityError(
            f"W&B does not start: {said}; with WANDB_MODE=offline it writes files alone, or leave "
            "out --wandb-project"
        ) from error
