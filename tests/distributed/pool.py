"""Pools of ranks for tests: processes that live as long as the session, one pool a world size.

Importing Megatron takes about ten seconds, so a fork server imports it once and every rank is a
fork of that. The server has one thread (OMP_NUM_THREADS=1) and never opens a process group, so
forking it is sound.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.distributed.worker import STACK_SIGNAL, Answer, Call, load_megatron, log_path, serve
from tests.paths import ROOT

START_TIMEOUT = 300.0  # seconds; a cold disk makes the imports slow
# After one rank has failed, the others wait for it in a collective for ever. They get this long to
# fail as well, so that an error on every rank is reported for every rank.
GRACE = 2.0
STACK_WAIT = 0.3
LOG_TAIL = 4000  # characters
# Of one rank. A training run can leave process groups that Megatron or torch still refers to,
# with three threads each, and every later call is slower for them.
MAX_THREADS = 500


@dataclass(frozen=True, eq=False)
class Kind:
    """What the ranks of a pool are forked from, a server for each kind.

    Attributes:
        preload: module that the server imports, with all that a rank needs; None where a rank has
            to prepare its process ahead of all imports, which is then a new one.
        load: what each rank calls (again), so that it can report what failed; sent by name.
        variables: of the environment, besides those of every server.
    """

    preload: str | None
    load: Callable[[], None]
    variables: Mapping[str, str] = field(default_factory=dict)
    server: forkserver.ForkServer = field(default_factory=forkserver.ForkServer)


PORTABLE = Kind("tests.distributed.preload", load_megatron)

_FORK_SERVER_ENVIRONMENT = {
    # It finds tests.distributed.preload by this: not every 3.12 hands it our sys.path.
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    # These are the tests of the CPU path, on a machine with GPUs too.
    "CUDA_VISIBLE_DEVICES": "",
}


class RankError(Exception):
    """At least one rank raised, died or hung. `failures` has a text for each of them, by rank."""

    def __init__(self, world_size: int, failures: dict[int, str]) -> None:
        self.world_size = world_size
        self.failures = dict(sorted(failures.items()))
        names = ", ".join(str(rank) for rank in self.failures)
        parts = [f"{len(failures)} of {world_size} ranks failed: {names}"]
        parts += [f"--- rank {rank} ---\n{text}" for rank, text in self.failures.items()]
        super().__init__("\n".join(parts))


class RankPool:
    """`world_size` processes that run one call at a time."""

    def __init__(self, world_size: int, kind: Kind = PORTABLE) -> None:
        self.world_size = world_size
        self._folder = Path(tempfile.mkdtemp(prefix=f"ranks-{world_size}-"))
        self._calls = itertools.count()
        self._connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        context: Any = multiprocessing.get_context("forkserver" if kind.preload else "spawn")
        if kind.preload:
            kind.server.set_forkserver_preload([kind.preload])
        with _environment({**_FORK_SERVER_ENVIRONMENT, **kind.variables}), _served_by(kind.server):
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=serve,
                    args=(theirs, rank, world_size, self._folder, kind.load),
                    name=f"rank {rank} of {world_size}",
                )
                process.start()
                theirs.close()
                self._connections.append(ours)
                self._processes.append(process)
        try:
            self._gather(START_TIMEOUT, dict.fromkeys(range(world_size), 0))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int | None]:
        return [process.pid for process in self._processes]

    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def is_worn(self) -> bool:
        """Whether one of the living ranks has more threads than it should have."""
        return any(len(os.listdir(f"/proc/{pid}/task")) > MAX_THREADS for pid in self.pids)

    def run(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float
    ) -> list[Any]:
        """The results in the order of the ranks. After a `RankError` see `is_alive`."""
        rendezvous = self._folder / f"call-{next(self._calls)}"
        # Plain pickle: the reducers of torch.multiprocessing would share memory with the ranks.
        request = pickle.dumps(Call(function, arguments, rendezvous, timeout))
        log_starts = {rank: self._log_size(rank) for rank in range(self.world_size)}
        for connection in self._connections:
            # A rank that has died is reported when its answer is missing.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.send_bytes(request)
        return self._gather(timeout, log_starts)

    def close(self) -> None:
        """Kill the processes, with the children they may have started."""
        for process in self._processes:
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _gather(self, timeout: float, log_starts: dict[int, int]) -> list[Any]:
        """Every rank's answer. Kills the pool if one is missing: it may be anywhere in its call."""
        answers: dict[int, Answer] = {}
        failures: dict[int, str] = {}
        pending = set(range(self.world_size))
        deadline = time.monotonic() + timeout
        while pending:
            for rank in self._ready(pending, deadline - time.monotonic()):
                pending.discard(rank)
                try:
                    answers[rank] = pickle.loads(self._connections[rank].recv_bytes())
                except (EOFError, ConnectionResetError):
                    failures[rank] = self._epitaph(rank)
                else:
                    if (error := answers[rank].error) is not None:
                        failures[rank] = error
                if rank in failures:
                    failures[rank] += self._log_tail(rank, log_starts[rank])
                    deadline = min(deadline, time.monotonic() + GRACE)
            if pending and time.monotonic() >= deadline:
                break
        if pending:
            if not failures:
                failures = self._hung(pending, timeout, log_starts)
            self.close()
        elif failures and not self.is_alive():
            self.close()
        if failures:
            raise RankError(self.world_size, failures)
        return [answers[rank].result for rank in range(self.world_size)]

    def _ready(self, pending: set[int], timeout: float) -> list[int]:
        """Ranks that have answered or died within `timeout` seconds."""
        owners: dict[Any, int] = {self._connections[rank]: rank for rank in pending}
        # A child of a dead rank can hold its connection open, so that alone would not tell.
        owners |= {self._processes[rank].sentinel: rank for rank in pending}
        return sorted({owners[ready] for ready in wait(list(owners), max(timeout, 0.0))})

    def _epitaph(self, rank: int) -> str:
        self._processes[rank].join(STACK_WAIT)
        code = self._processes[rank].exitcode
        how = f"by {signal.Signals(-code).name}" if code and code < 0 else f"with exit code {code}"
        return f"the process ended {how}\n"

    def _hung(
        self, pending: set[int], timeout: float, log_starts: dict[int, int]
    ) -> dict[int, str]:
        for rank in pending:
            if (pid := self._processes[rank].pid) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, STACK_SIGNAL)
        time.sleep(STACK_WAIT)
        text = f"no answer within {timeout:g} s; it was here:\n"
        return {rank: text + self._log_tail(rank, log_starts[rank]) for rank in sorted(pending)}

    def _log_size(self, rank: int) -> int:
        return log_path(self._folder, rank).stat().st_size

    def _log_tail(self, rank: int, start: int) -> str:
        try:
            written = log_path(self._folder, rank).read_bytes()[start:]
        except FileNotFoundError:
            return ""
        text = written.decode(errors="replace").strip()[-LOG_TAIL:]
        return f"output of rank {rank}:\n{text}\n" if text else ""


class RankPools:
    """A pool for each world size, started when first needed, and again when lost or worn."""

    def __init__(self, kind: Kind = PORTABLE) -> None:
        self.kind = kind
        self._pools: dict[int, RankPool] = {}
        # A process that is not a daemon is waited for at exit; a rank would wait for us in turn.
        # (Daemons cannot have children, and data loaders do.)
        atexit.register(self.close)

    def run[T](
        self,
        function: Callable[..., T],
        *arguments: Any,
        world_size: int,
        timeout: float = 120.0,
    ) -> list[T]:
        """Run `function(rank, world_size, *arguments)` on every rank, with gloo initialized.

        Args:
            function: defined at the top of a module, since it is sent by name.
            arguments: anything that can be pickled; each rank gets its own copy.
            timeout: seconds for the call. A hung pool is killed, and the next call starts anew.

        Returns: the result of each rank, in order.

        Raises:
            RankError: a rank raised, died or hung. It names the rank and has the traceback.
        """
        return self.pool(world_size).run(function, arguments, timeout)

    def pool(self, world_size: int) -> RankPool:
        pool = self._pools.get(world_size)
        if pool is not None and (not pool.is_alive() or pool.is_worn()):
            pool.close()
            pool = None
        if pool is None:
            pool = self._pools[world_size] = RankPool(world_size, self.kind)
        return pool

    def close(self) -> None:
        while self._pools:
            self._pools.popitem()[1].close()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@contextlib.contextmanager
def _served_by(server: forkserver.ForkServer) -> Iterator[None]:
    """multiprocessing has one server, which it finds through this name."""
    before = forkserver.connect_to_new_process
    setattr(forkserver, "connect_to_new_process", server.connect_to_new_process)
    try:
        yield
    finally:
        setattr(forkserver, "connect_to_new_process", before)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set for the fork server, which copies the environment when it starts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
