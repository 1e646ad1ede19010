"""Where ranks meet that torchrun has started anew within a launch."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist


def store_of_restart(timeout_minutes: float) -> dist.Store | None:
    """A store that has nothing of the ranks before these; None in a first start, which needs none.

    torchrun's store lives as long as torchrun. In what torch makes of it by itself the ranks would
    find the addresses of those that are gone, and wait for them until the timeout.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0":
        return None
    store, _, _ = next(dist.rendezvous("env://"))
    store.set_timeout(timedelta(minutes=timeout_minutes))
    return dist.PrefixStore(f"trinity/restart/{restart}", store)
