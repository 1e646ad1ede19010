"""A checkpoint that is written in the background has the values of the step that it was saved at.

Reason: Megatron hands CPU tensors to its worker process as they are. Passing a tensor between
processes moves it into shared memory, so the worker writes whatever training has made of it by
then. A worker that has ended is waited for without end, and a worker is a new process that has none
of the adaptations.
Written for: megatron-core 0.19.2.
Remove when: the worker gets copies of CPU tensors, and its end is an error.
"""

from __future__ import annotations

import functools
import time
from typing import Any

from megatron_trinity.errors import TrinityError

POLL = 0.1  # seconds

_loop: Any = None
"""Megatron's loop of the worker."""


def adapted_loop(*args: Any) -> None:
    """What the worker runs; it may be a new process, which finds this by its name."""
    from megatron_trinity.upstream.adapt import adapt_megatron

    adapt_megatron()
    _loop(*args)


def stage(write_buckets: list[Any]) -> None:
    """Replace tensors on the CPU by copies, in place: nobody else has these."""
    for _, _, (_, tensors) in write_buckets:
        for number, (item, tensor) in enumerate(tensors):
            if tensor.is_cpu:
                tensors[number] = (item, tensor.clone())


def install() -> None:
    """Wrap the scheduling of a save, the question whether it is done, and the worker's loop."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    global _loop
    schedule = PersistentAsyncCaller.schedule_async_call
    is_done = PersistentAsyncCaller.is_current_async_call_done

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
    PersistentAsyncCaller.schedule_async_call = stage_and_schedule
    PersistentAsyncCaller.is_current_async_call_done = is_done_or_dead
    PersistentAsyncCaller.async_loop = staticmethod(adapted_loop)
