"""Long work in units, by several processes, that goes on where it was interrupted.

Each unit writes files of its own into a staging directory; what it returns is recorded there once
they are whole. A second run over the same plan takes finished units from their records.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_trinity.checkpoint.allocator import return_freed_memory
from megatron_trinity.errors import TrinityError, UsageError
from megatron_trinity.progress import Progress

PLAN, LOCK = "plan.json", "lock"
_SECONDS_BETWEEN_UPDATES = 0.2

Report = Callable[[int], None]
"""Is told bytes that were done since it was called last."""


@dataclass(frozen=True)
class Unit:
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
    """A process is told to end in the middle of a unit."""


@contextlib.contextmanager
def resumable_staging(target: Path, plan: object, needed: int) -> Iterator[Path]:
    """A hidden directory beside `target` for work that `plan` describes.

    It is gone when the work is done and after an error in what is converted, kept if the work is
    interrupted or the disk fails, and emptied first if it is of another plan.

    Args:
        plan: all that the result depends on, fit for JSON.
        needed: bytes that the work writes.

    Raises:
        TrinityError: it cannot be made, the disk is too small, another process is at work there.
    """
    staging = target.parent / f".{target.name}.part"
    fingerprint = {"plan": hashlib.sha256(json.dumps(plan).encode()).hexdigest()}
    parent_is_new = not target.parent.exists()
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = open(staging / LOCK, "w")  # noqa: SIM115
    except OSError as error:
        raise TrinityError(f"cannot write into {target.parent}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrinityError(f"another process is writing {target}") from error
        try:
            _keep_or_empty(staging, fingerprint)
            _refuse_small_disk(staging, needed)
            yield staging
            shutil.rmtree(staging)
        except TrinityError:
            shutil.rmtree(staging, ignore_errors=True)
            if parent_is_new:
                target.parent.rmdir()
            raise
        except OSError as error:
            raise TrinityError(
                f"cannot write {target}: {error.strerror or error}; what is finished is kept in "
                f"{staging}, run the same again to go on"
            ) from error


def _keep_or_empty(staging: Path, fingerprint: dict[str, str]) -> None:
    plan = staging / PLAN
    if not plan.is_file() or json.loads(plan.read_text()) != fingerprint:
        for path in staging.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        plan.write_text(json.dumps(fingerprint))


def _refuse_small_disk(staging: Path, needed: int) -> None:
    # Of a file that has all its length from the beginning, what is on the disk counts.
    written = sum(512 * path.stat().st_blocks for path in staging.rglob("*") if path.is_file())
    free = shutil.disk_usage(staging).free
    if needed - written > free:
        raise TrinityError(
            f"{needed / 1e9:,.1f} GB are to be written and {staging.parent} has "
            f"{free / 1e9:,.1f} GB free"
        )


def run_units(
    work: Callable[[Any, Report], Any],
    units: Sequence[Unit],
    staging: Path,
    workers: int,
    progress: Progress,
    settle: Callable[[Any], None] | None = None,
    prepare: Callable[[], None] | None = None,
) -> list[Any]:
    """Do every unit that has no record yet; returns what each one gave, in order.

    Args:
        work: at the level of a module; does the job of a unit.
        workers: processes; with one, this process does it.
        settle: called here with what a unit gave, before it is recorded: has the disk keep its
            files, while the other processes go on.
        prepare: at the level of a module; another process calls it before it takes a unit.

    Raises:
        Exception: what a unit raised; the others are stopped.
    """
    results: dict[str, Any] = {}
    for unit in units:
        with contextlib.suppress(OSError):
            results[unit.name] = pickle.loads((staging / unit.record).read_bytes())
    left = [unit for unit in units if unit.name not in results]
    done = sum(unit.nbytes for unit in units if unit.name in results)

    def finished(unit: Unit, result: Any) -> None:
        if settle is not None:
            settle(result)
        results[unit.name] = result
        beside = staging / f"{unit.record}.new"
        beside.write_bytes(pickle.dumps(result))
        os.replace(beside, staging / unit.record)

    with progress:
        if workers == 1 or len(left) == 1:
            for unit in left:
                counter = ByteCounter(done, progress)
                finished(unit, work(unit.job, counter))
                done = counter.done
        elif left:
            count = min(workers, len(left))
            _in_processes(work, left, count, done, progress, finished, prepare)
    return [results[unit.name] for unit in units]


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
    units: Sequence[Unit],
    workers: int,
    done_before: int,
    progress: Progress,
    finished: Callable[[Unit, Any], None],
    prepare: Callable[[], None] | None,
) -> None:
    # Not forked: this process may have threads, which a copy of it would lack.
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, _set_up_worker, (done, stop, prepare)) as pool:
        futures: dict[Future[Any], Unit] = {
            pool.submit(_work_in_worker, work, unit.job): unit for unit in units
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


def add_resource_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `memory_and_workers` takes."""
    parser.add_argument(
        "--memory-gb",
        type=float,
        default=2.0,
        help="memory for values, in GiB, of all processes together (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, help="processes (default: one a CPU, 4 at most)")


def memory_and_workers(memory_gib: float, workers: int | None) -> tuple[int, int]:
    """Bytes and processes that a command line asks for; by default a process a CPU, 4 at most.

    Raises:
        UsageError: one of them is not positive.
    """
    workers = min(4, len(os.sched_getaffinity(0))) if workers is None else workers
    if memory_gib <= 0 or workers < 1:
        raise UsageError(f"--memory-gb {memory_gib} and --workers {workers} have to be positive")
    return int(memory_gib * 2**30), workers
