"""The loss and the gradient norm of each step of a training run, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.trainer import run_trainer


@contextmanager
def recording(file: Path) -> Iterator[None]:
    """Append a line to `file` for each step of the runs inside; the last rank does."""
    import torch.distributed as dist
    from megatron.training import training

    original = training.training_log

    def log(losses: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        iteration, norm = args[2], args[6]
        if dist.get_rank() == dist.get_world_size() - 1:
            values = [float(losses[name]).hex() for name in sorted(losses) if "loss" in name]
            of_gradients = math.nan if norm is None else float(norm)
            with open(file, "a") as stream:
                stream.write(f"{iteration} {','.join(values)} {of_gradients.hex()}\n")
        return original(losses, *args, **kwargs)

    training.training_log = log
    try:
        yield
    finally:
        training.training_log = original


def run_recorded(rank: int, world_size: int, flags: Sequence[str], file: Path) -> int:
    """Train in this process, recording the steps; returns the exit code."""
    with recording(file):
        return run_trainer(rank, world_size, flags)


def recorded(file: Path) -> list[tuple[int, str]]:
    """The steps of all runs that were recorded into `file`, in their order.

    Each has its iteration, and its losses and gradient norm in hexadecimal.
    """
    if not file.exists():
        return []
    lines = [line.split(" ", 1) for line in file.read_text().splitlines() if line.count(" ") == 2]
    return [(int(number), values) for number, values in lines]
