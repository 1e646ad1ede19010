"""Long work cut into tasks, by several processes, that goes on where it was interrupted.

Each task writes files of its own into a staging directory; what it returns is recorded there once
they are whole. A second run over the same plan takes finished tasks from their records.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_trinity.checkpoint.conversion.allocator import return_freed_memory
from megatron_trinity.progress import Progress

_SECONDS_BETWEEN_UPDATES = 0.2

Report = Callable[[int], None]
"""Is told bytes that were done since it was called last."""


@dataclass(frozen=True)
class Task:
    """A part of the work.

    Attributes:
        name: of its record.
        nbytes: that it writes.
        job: what the work's function takes; goes to another process.
    """

    name: str
    nbytes: int
    job: Any

    @property
    def record(self) -> str:
        return f"{self.name}.done"


class Stopped(Exception):
    """A process is told to end in the middle of a task."""


def run_tasks(
    work: Callable[[Any, Report], Any],
    tasks: Sequence[Task],
    staging: Path,
    workers: int,
    progress: Progress,
    settle: Callable[[Any], None] | None = None,
    prepare: Callable[[], None] | None = None,
) -> list[Any]:
    """Do every task that has no record yet; returns what each one gave, in order.

    Args:
        work: at the level of a module; does the job of a task.
        workers: processes; with one, this process does it.
        settle: called here with what a task gave, before it is recorded: has the disk keep its
            files, while the other processes go on.
        prepare: at the level of a module; another process calls it before it takes a task.

    Raises:
        Exception: what a task raised; the others are stopped.
    """
    results: dict[str, Any] = {}
    for task in tasks:
        with contextlib.suppress(OSError):
            results[task.name] = pickle.loads((staging / task.record).read_bytes())
    left = [task for task in tasks if task.name not in results]
    done = sum(task.nbytes for task in tasks if task.name in results)

    def finished(task: Task, result: Any) -> None:
        if settle is not None:
            settle(result)
        results[task.name] = result
        beside = staging / f"{task.record}.new"
        beside.write_bytes(pickle.dumps(result))
        os.replace(beside, staging / task.record)

    with progress:
        if workers == 1 or len(left) == 1:
            for task in left:
                counter = ByteCounter(done, progress)
                finished(task, work(task.job, counter))
                done = counter.done
        elif left:
            count = min(workers, len(left))
            _in_processes(work, left, count, done, progress, finished, prepare)
    return [results[task.name] for task in tasks]


class ByteCounter:
    """A report of this process to its own display, on top of `done` bytes."""

    def __init__(self, done: int, progress: Progress) -> None:
        self.done = done
        self._progress = progress

    def __call__(self, nbytes: int) -> None:
        self.done += nbytes
        self._progress.update(self.done)


def _in_processes(
    work: Callable[[Any, Report], Any],
    tasks: Sequence[Task],
    workers: int,
    done_before: int,
    progress: Progress,
    finished: Callable[[Task, Any], None],
    prepare: Callable[[], None] | None,
) -> None:
    # Not forked: this process may have threads, which a copy of it would lack.
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, _set_up_worker, (done, stop, prepare)) as pool:
        futures: dict[Future[Any], Task] = {
            pool.submit(_work_in_worker, work, task.job): task for task in tasks
        }
        waiting = set(futures)
        try:
            while waiting:
                ready, waiting = wait(waiting, _SECONDS_BETWEEN_UPDATES, FIRST_EXCEPTION)
                for future in ready:
                    finished(futures[future], future.result())
                progress.update(done_before + done.value)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


_done: Any
_stop: Any


def _set_up_worker(done: Any, stop: Any, prepare: Callable[[], None] | None) -> None:
    global _done, _stop
    _done, _stop = done, stop
    return_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and sets `stop`
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare is not None:
        prepare()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work_in_worker(work: Callable[[Any, Report], Any], job: Any) -> Any:
    return work(job, _report_from_worker)


def _report_from_worker(nbytes: int) -> None:
    if _stop.is_set():
        raise Stopped
    with _done.get_lock():
        _done.value += nbytes
