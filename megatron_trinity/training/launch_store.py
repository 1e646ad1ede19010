"""The store through which the ranks of one start talk, ahead of a process group and beside it.

torchrun keeps its store when it starts ranks anew (`--max-restarts`), and in it the addresses of
those that are gone: gloo and NCCL would look for them. What a start writes is under a name of its
own, therefore, on which its ranks agree first. How often ranks were started is no such name: nodes
count differently.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from megatron_trinity.errors import TrinityError

POLL = 0.02
"""Seconds between two looks at what others have written."""


def launch_store(minutes: float) -> dist.Store:
    """The store of this start; every rank has to call it.

    Args:
        minutes: that ranks may take to come, and later to answer each other.

    Raises:
        TrinityError: some have not come.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if dist.is_initialized():
        store = distributed_c10d._get_default_store()
    else:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=minutes)))
    return fresh(store, rank, world_size, 60.0 * minutes)


def fresh(store: dist.Store, rank: int, world_size: int, seconds: float) -> dist.Store:
    """The part of `store` that no ranks but those of this start know of.

    Rank 0 makes up its name and tells it to who asks. Each of the others asks with a word of its
    own, so that an answer to a rank that is gone, or from one, is told from that to itself.

    Raises:
        TrinityError: not all ranks have come in time.
    """
    deadline = time.monotonic() + seconds
    if rank == 0:
        name = uuid4().hex
        answered = dict.fromkeys(range(1, world_size), "")

        def lets_in() -> bool:
            for other, word in list(answered.items()):
                asked = _read(store, f"trinity/asks/{other}")
                if asked not in ("", word):
                    store.set(f"trinity/told/{other}", f"{asked} {name}")
                    answered[other] = asked
                if _read(store, f"trinity/knows/{other}") == name:
                    del answered[other]
            return not answered

        _until(lets_in, deadline, lambda: f"rank {min(answered)}", seconds)
    else:
        word, name = uuid4().hex, ""
        store.set(f"trinity/asks/{rank}", word)

        def is_told() -> bool:
            nonlocal name
            asked, _, name = _read(store, f"trinity/told/{rank}").partition(" ")
            return asked == word

        _until(is_told, deadline, lambda: "rank 0", seconds)
        store.set(f"trinity/knows/{rank}", name)
    return dist.PrefixStore(f"trinity/{name}", store)


def own_client(store: Any) -> dist.Store:
    """The same store for another thread: one that waits keeps all others of its client waiting."""
    client: dist.Store = store.clone()
    return client


def _read(store: dist.Store, key: str) -> str:
    """ "" as long as nobody has written it."""
    return store.get(key).decode() if store.check([key]) else ""


def _until(
    come: Callable[[], bool], deadline: float, missing: Callable[[], str], seconds: float
) -> None:
    while not come():
        if time.monotonic() > deadline:
            raise TrinityError(
                f"{missing()} has not come within {seconds / 60:g} minutes; see its output, and "
                "--distributed-timeout-minutes"
            )
        time.sleep(POLL)
