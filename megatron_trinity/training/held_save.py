"""The directory of `--save` is held by one run, from its start to its end."""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_trinity.checkpoint.whole.hold import Hold, holding
from megatron_trinity.errors import TrinityError
from megatron_trinity.training.resume import check_writable

EVER = timedelta(days=999)
LAST_WORDS = 5.0
"""Seconds that a verdict has to reach all ranks before rank 0, which may have their store, ends."""


@contextmanager
def held_save(args: Namespace, store: dist.Store) -> Iterator[Hold | None]:
    """Hold `--save` on rank 0, and wait for that on the others; None there, or without `--save`.

    Args:
        store: of the launch.

    Raises:
        TrinityError: another run holds it, or it cannot be written; the same on all ranks.
    """
    if not args.save or args.skip_train:
        yield None
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with ExitStack() as stack:
        held, fault = None, ""
        if rank == 0:
            try:
                check_writable(Path(args.save))
                held = stack.enter_context(_holding(args))
            except TrinityError as error:
                fault = str(error)
        fault = by_store(store, rank, world_size, fault)
        if fault:
            raise TrinityError(fault)
        yield held


def _holding(args: Namespace) -> AbstractContextManager[Hold]:
    return holding(
        Path(args.save),
        wait=args.save_in_use == "wait",
        silence=args.save_silence,
        say=lambda line: print(f"WARNING: --save {line}", flush=True),
    )


def by_store(store: dist.Store, rank: int, world_size: int, fault: str) -> str:
    """What rank 0 has to say, on every rank, before there is a process group.

    Args:
        store: of the launch.
        fault: of rank 0; "" if there is none.
    """
    key = "save"
    if rank != 0:
        store.wait([key], EVER)
        fault = store.get(key).decode()
        store.add(f"{key}/heard", 1)
        return fault
    store.set(key, fault)
    deadline = time.monotonic() + LAST_WORDS
    while fault and store.add(f"{key}/heard", 0) < world_size - 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    return fault
