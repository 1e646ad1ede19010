"""A save that is not in the background starts no process."""

from __future__ import annotations

import queue
from typing import Any

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="save-results",
    symbols=(
        "megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue",
        "megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue",
    ),
    reason=(
        "each rank starts a server process for the results of writing, although the rank itself "
        "writes. It costs seconds at the first save, and stays behind if the rank is killed"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="the queue of results is made for saves in the background alone",
    after=("async-saves",),
)


def install() -> None:
    """Replace how the queue is made. Background saves ask for theirs at start, as a fork's."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    original = filesystem_async.get_write_results_queue

    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        if mp_mode == "spawn" and filesystem_async._results_queue is None:
            return queue.Queue()
        return original(mp_mode)

    filesystem_async.get_write_results_queue = get_write_results_queue
