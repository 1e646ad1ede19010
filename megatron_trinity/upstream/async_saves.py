"""A checkpoint that is written in the background has the values of the step of its save."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import signal
import time
from multiprocessing.managers import SyncManager
from typing import Any

from megatron_trinity.errors import TrinityError
from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="async-saves",
    symbols=(
        "megatron.core.dist_checkpointing.strategies.async_utils.PersistentAsyncCaller"
        ".schedule_async_call",
        "megatron.core.dist_checkpointing.strategies.async_utils.PersistentAsyncCaller"
        ".is_current_async_call_done",
        "megatron.core.dist_checkpointing.strategies.async_utils.PersistentAsyncCaller.async_loop",
        "megatron.training.initialize.init_persistent_async_worker",
        "megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue",
    ),
    reason=(
        "Megatron hands CPU tensors to its worker process as they are. Passing a tensor between "
        "processes moves it into shared memory, so the worker writes whatever training has made "
        "of it by then. A worker that has ended is waited for without end, and a worker is a new "
        "process that has none of the adaptations. A scheduler sends SIGTERM to all processes of "
        "a job, and those that write the last checkpoint would be the first to end"
    ),
    written_for="megatron-core 0.19.2",
    remove_when=(
        "the worker gets copies of CPU tensors, is deaf to SIGTERM, and its end is an error"
    ),
    after=("cpu-async-saves",),
)


POLL = 0.1  # seconds
PR_SET_PDEATHSIG = 1

_loop: Any = None
"""Megatron's loop of the worker."""


def adapted_loop(*args: Any) -> None:
    """What the worker runs; it may be a new process, which finds this by its name."""
    from megatron_trinity.upstream.adapt import adapt_megatron

    adapt_megatron()
    _loop(*args)


def end_with_parent() -> None:
    """Have this process killed when the one that has started it ends, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve_to_the_end() -> None:
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def results_queue() -> Any:
    """A queue for the results of writers in other processes, in a server process."""
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(initializer=_serve_to_the_end)
    return manager.Queue()


def stage(write_buckets: list[Any]) -> None:
    """Replace tensors on the CPU by copies, in place: nobody else has these."""
    for _, _, (_, tensors) in write_buckets:
        for number, (item, tensor) in enumerate(tensors):
            if tensor.is_cpu:
                tensors[number] = (item, tensor.clone())


def install() -> None:
    """Wrap the worker's start and loop, the scheduling of a save, and whether it is done."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.training import initialize

    global _loop
    start = initialize.init_persistent_async_worker
    schedule = PersistentAsyncCaller.schedule_async_call
    is_done = PersistentAsyncCaller.is_current_async_call_done

    @functools.wraps(start)
    def start_deaf(*args: Any, **kwargs: Any) -> None:
        if filesystem_async._results_queue is None:
            filesystem_async._results_queue = results_queue()
        # What is started inherits this, and not the trainer's handler if it is a new program.
        handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            start(*args, **kwargs)
        finally:
            signal.signal(signal.SIGTERM, handler)

    @functools.wraps(schedule)
    def stage_and_schedule(self: Any, request: Any) -> None:
        if request.async_fn is not None:
            _, write_buckets, _ = request.async_fn_args
            stage(write_buckets)
        schedule(self, request)

    @functools.wraps(is_done)
    def is_done_or_dead(self: Any, blocking: bool = False, no_dist: bool = False) -> Any:
        while self.process and self.cur_item is None and self._persistent_comp_q.empty():
            if not self.process.is_alive():
                raise TrinityError("the process that writes checkpoints has ended")
            if not blocking:
                break
            time.sleep(POLL)
        return is_done(self, blocking, no_dist)

    _loop = PersistentAsyncCaller.async_loop
    initialize.init_persistent_async_worker = start_deaf
    PersistentAsyncCaller.schedule_async_call = stage_and_schedule
    PersistentAsyncCaller.is_current_async_call_done = is_done_or_dead
    PersistentAsyncCaller.async_loop = staticmethod(adapted_loop)
