"""Before the first step: a rank that was told to stop leaves at once, and the others follow it.

From the first step on all ranks leave behind the same one (`leaving.py`). Until then there is no
exchange that every rank comes to, so the word goes through the store of their launch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from megatron_trinity.errors import Stopped, TrinityError
from megatron_trinity.training.launch_store import own_client
from megatron_trinity.training.stop import LOOK, Stop

KEY = "stopped"


@contextmanager
def following(stop: Stop, store: dist.Store) -> Iterator[None]:
    """Up to the first step, tell other ranks that this one leaves, and leave with one that does.

    Raises:
        Stopped: another rank was told to; an error that has come of that included.
    """
    own = own_client(store)
    ended = threading.Event()
    thread = threading.Thread(target=_listen, args=(stop, own, ended), daemon=True)
    thread.start()
    try:
        yield
    except (TrinityError, Stopped):
        raise
    except Exception:
        if stop.has_begun or not stop.wait(2 * LOOK):
            raise
        raise stop.before_the_first_step(stop.first) from None
    finally:
        ended.set()
        _tell(stop, own)


def _listen(stop: Stop, store: dist.Store, ended: threading.Event) -> None:
    while not stop.has_begun and not ended.wait(LOOK):
        with suppress(Exception):  # the store may be gone, with the launcher
            _tell(stop, store)
            if not stop.pending and store.check([KEY]):
                code = int(store.get(KEY))
                stop.hear(next(reason for reason in stop.reasons if reason.code == code))


def _tell(stop: Stop, store: dist.Store) -> None:
    if stop.pending and not stop.has_begun:
        with suppress(Exception):
            store.set(KEY, str(stop.first.code))
