"""How much memory a piece of work takes at its peak, measured in a process of its own."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection

Work = Callable[[], object]


def peak_memory(prepare: Callable[[], Work]) -> int:
    """Bytes that a piece of work holds at its peak, above what the process held before it.

    Args:
        prepare: makes what is not counted, in a fork of this process, and returns the work. Call
            before threads are started (by autograd, for one): they do not survive a fork.

    Raises:
        EOFError: the work failed; the fork has printed why.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(prepare, sender))
    child.start()
    sender.close()
    peak: int = receiver.recv()
    child.join()
    return peak


def _measure(prepare: Callable[[], Work], sender: Connection) -> None:
    from megatron_trinity.upstream.cpu.memory import (
        peak_resident_bytes,
        reset_peak,
        resident_bytes,
    )

    work = prepare()
    # What the preparation has freed would hide as much of the work.
    ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    before = resident_bytes()
    work()
    sender.send(peak_resident_bytes() - before)
