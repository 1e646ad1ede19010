"""A thread in each rank that ends the run when no step comes, or when another rank is gone.

It works while the main thread waits in a collective, which may be for ever. What ranks tell each
other goes through the store of their launch: who they are, that they live, where they are stuck.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict

import torch.distributed as dist

from megatron_trinity import exits
from megatron_trinity.checkpoint.whole.owner import Owner, this_process
from megatron_trinity.errors import OF_THIS_RANK, Stopped, TrinityError, root_cause
from megatron_trinity.reporting.events import note_from_here, run_folder
from megatron_trinity.training.launch_store import own_client
from megatron_trinity.training.stop import leave
from megatron_trinity.training.stuck import Stuck, behind, stuck_here, write_stacks

BEAT = 1.0
"""Seconds between two looks of the thread."""

APART = 10
"""How many times as long as a step the first one may take, and what is between two: a save."""

RECORDS, VERDICT = 5.0, 8.0
"""Seconds for every rank to say where it is stuck, and to hear what rank 0 makes of it."""

CAUSE = 3.0
"""Seconds for the death of another rank to be known, where this one has lost a connection to it."""

_CONNECTION = ("connection", "gloo", "nccl", "socket", "peer", "store", "timed out")


class Watch:
    """What the main thread tells, and the thread that looks whether it does.

    Args:
        args: `hang_minutes`, 0 for no alarm.
        store: of the launch.
    """

    def __init__(self, args: Namespace, store: dist.Store) -> None:
        self._store = dist.PrefixStore("watch", own_client(store))
        self._limit = 60.0 * args.hang_minutes
        self._folder = run_folder(args)
        self._iteration, self._may_take, self._since = 0, 0.0, time.monotonic()
        self._started, self._closed = False, threading.Event()
        self._thread = threading.Thread(target=self._live, name="watch", daemon=True)

    def step_begins(self, iteration: int) -> None:
        """Before each step, the `iteration`-th; the first call starts the watch."""
        self._now(iteration, self._limit if self._started else self._limit * APART)
        if not self._started:
            self._start()

    def step_ends(self) -> None:
        """Behind each step, and what belongs to it."""
        self._now(self._iteration, self._limit * APART)

    def alive(self) -> None:
        """Something that is no step goes on, such as an evaluation."""
        self._now(self._iteration, self._may_take)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch in here, and tell the cause of an error from what follows from it.

        Raises:
            Stopped: an error of this rank comes from the end of another one.
        """
        try:
            yield
        except Stopped:
            raise
        except TrinityError as error:
            self._follow(str(error))  # a save, for one, fails where another rank has died in it
            raise
        except Exception as error:
            self._blame(error)
            raise
        finally:
            self._end()

    def _now(self, iteration: int, may_take: float) -> None:
        self._iteration, self._may_take, self._since = iteration, may_take, time.monotonic()

    def _start(self) -> None:
        self._started = True
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        with suppress(Exception):  # the store is gone, with the launcher: this step is the last one
            self._store.set(f"who/{self._rank}", json.dumps(asdict(this_process())))
        self._neighbours: dict[int, Owner] = {}
        self._thread.start()

    def _end(self) -> None:
        """Leave in peace; rank 0, which may have the store, when all have, or after a moment."""
        if not self._started or self._closed.is_set():
            return
        self._closed.set()
        self._thread.join(BEAT)
        with suppress(Exception):
            self._store.set(f"left/{self._rank}", "")
            self._store.add("left", 1)
            deadline = time.monotonic() + CAUSE
            while self._rank == 0 and self._store.add("left", 0) < self._ranks:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)

    def _follow(self, text: str) -> None:
        """Leave, in one line, if an error with this text comes from the end of another rank.

        Raises:
            Stopped: it does.
        """
        lost = any(word in text.lower() for word in _CONNECTION)
        if not (self._started and lost and self._ranks > 1):
            return
        deadline = time.monotonic() + CAUSE
        while time.monotonic() < deadline:
            cause = None
            with suppress(Exception):  # the store may be gone, too
                cause = self._cause()
            if cause is not None:
                self._closed.set()
                line = cause if self._speaks() else ""
                self._note("rank lost", line)
                raise Stopped(line, exits.PEER_LOST, by_any=True) from None
            time.sleep(0.1)

    def _blame(self, error: Exception) -> None:
        """Tell the other ranks of an error, unless it comes from the end of one of them."""
        text = f"{type(error).__name__}: {root_cause(error)}"
        self._follow(text)
        if not self._started:
            return
        self._closed.set()
        with suppress(Exception):
            self._store.set("cause", f"rank {self._rank}, in iteration {self._iteration}: {text}")
            setattr(error, OF_THIS_RANK, True)

    def _live(self) -> None:
        while not self._closed.wait(BEAT):
            if self._limit and time.monotonic() - self._since > self._may_take:
                self._hang()
            try:
                cause = self._cause()
            except Exception:  # the store is gone, with the launcher or with rank 0
                continue
            # The main thread may meet it as well, in its own way.
            if cause is not None and not self._closed.wait(2 * BEAT):
                line = cause if self._speaks() else ""
                self._note("rank lost", line)
                leave(line, exits.PEER_LOST)

    def _note(self, what: str, line: str) -> None:
        """Keep what is told of the end of the run; nothing on ranks that do not tell it."""
        if line:
            event = {"what": what, "iteration": self._iteration, "line": line}
            note_from_here({"kind": "alarm", **event})

    def _cause(self) -> str | None:
        """A line on a rank that is gone, if one is: of this machine, or as others have told."""
        if self._store.check(["cause"]):
            return (
                f"error: {self._store.get('cause').decode()}; all ranks end, and nothing is saved"
            )
        for rank, owner in self._of_this_machine().items():
            if owner.is_running() or self._store.check([f"left/{rank}"]):
                continue
            time.sleep(0.2)  # it may have told, in its last moment
            if not self._store.check(["cause"]):
                self._store.set(
                    "cause",
                    f"rank {rank} ({owner}) was killed in iteration {self._iteration}",
                )
            return self._cause()
        return None

    def _speaks(self) -> bool:
        """Whether this is the first rank to tell."""
        with suppress(Exception):
            return int(self._store.add("told", 1)) == 1
        return True

    def _of_this_machine(self) -> dict[int, Owner]:
        first = self._rank - int(os.environ.get("LOCAL_RANK", "0"))
        for rank in range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
            known = rank in self._neighbours or rank == self._rank
            if not known and self._store.check([f"who/{rank}"]):
                self._neighbours[rank] = Owner(**json.loads(self._store.get(f"who/{rank}")))
        return {rank: owner for rank, owner in self._neighbours.items() if owner.is_here()}

    def _hang(self) -> None:
        """Tell where this rank is stuck, hear where the others are, and end."""
        own = stuck_here(self._rank, self._iteration)
        where = write_stacks(self._folder, self._rank)
        line = f"error: no step for {(time.monotonic() - self._since) / 60:.3g} minutes"
        with suppress(Exception):
            self._store.set(f"stuck/{self._rank}", json.dumps(asdict(own)))
            records = self._records()
            if self._rank == min(records):
                line += f" in iteration {self._iteration}: {behind(records, self._names(records))}"
                leave_others(self._of_this_machine(), records)
                self._store.set("verdict", "")
                self._note("hang", line)
                leave(f"{line}; stacks are in {where}", exits.HUNG)
            deadline = time.monotonic() + VERDICT
            while not self._store.check(["verdict"]) and time.monotonic() < deadline:
                time.sleep(0.1)
            leave_others(self._of_this_machine(), records)
        leave("", exits.HUNG)

    def _records(self) -> dict[int, Stuck]:
        """Of all ranks, as far as they say so in time."""
        found: dict[int, Stuck] = {}
        deadline = time.monotonic() + RECORDS
        while len(found) < self._ranks and time.monotonic() < deadline:
            for rank in range(self._ranks):
                if rank not in found and self._store.check([f"stuck/{rank}"]):
                    found[rank] = Stuck(**json.loads(self._store.get(f"stuck/{rank}")))
            time.sleep(0.1)
        return found

    def _names(self, records: dict[int, Stuck]) -> dict[int, str]:
        names = {}
        for rank in range(self._ranks):
            if rank not in records and self._store.check([f"who/{rank}"]):
                names[rank] = str(Owner(**json.loads(self._store.get(f"who/{rank}"))))
        return names


def leave_others(neighbours: dict[int, Owner], records: dict[int, Stuck]) -> None:
    """Kill the ranks of this machine that are silent: one that is suspended hears nothing else."""
    for rank, owner in neighbours.items():
        if rank not in records and owner.is_running():
            with suppress(OSError):
                os.kill(owner.pid, signal.SIGKILL)
