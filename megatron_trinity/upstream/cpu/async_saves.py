"""Checkpoints are written in the background by a fork of the trainer.

A fork has the memory of the trainer as it was at that moment, and shares what does not change. It
writes files and takes part in nothing else, so it touches no thread or lock of the process groups.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from megatron_trinity.upstream.async_saves import end_with_parent
from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="cpu-async-saves",
    symbols=(
        "megatron.core.dist_checkpointing.strategies.async_utils.TemporalAsyncCaller"
        ".schedule_async_call",
        "megatron.training.async_utils.init_persistent_async_worker",
        "megatron.training.initialize.init_persistent_async_worker",
    ),
    reason=(
        "Megatron's worker process takes tensors from the devices of its trainer; on the CPU "
        "it would get them through shared memory, of which a machine may have little, and a "
        "file descriptor for each"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="the worker needs no shared memory for tensors on the CPU",
    when="without_cuda",
    after=("cpu-jit",),
)


def fork_for_each_save(rank: int, mp_mode: str) -> None:
    """In the place of the start of Megatron's worker."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.training import async_utils

    async_utils._async_calls_queue = AsyncCallsQueue(persistent=False)


def until_parent_ends(parent: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Run `function` in a child process, which ends when its parent does, however that ends.

    What goes on writing would write into what a restarted run saves.
    """
    end_with_parent()
    if os.getppid() == parent:
        function(*args, **kwargs)


def install() -> None:
    """Replace the start of the worker, and wrap what a fork runs."""
    from megatron.core.dist_checkpointing.strategies.async_utils import TemporalAsyncCaller
    from megatron.training import initialize

    schedule = TemporalAsyncCaller.schedule_async_call

    @functools.wraps(schedule)
    def schedule_in_child(self: Any, request: Any) -> None:
        if request.async_fn is not None:
            run = functools.partial(until_parent_ends, os.getpid(), request.async_fn)
            request = request._replace(async_fn=run)
        schedule(self, request)

    TemporalAsyncCaller.schedule_async_call = schedule_in_child
    initialize.init_persistent_async_worker = fork_for_each_save
