"""Launches of a run that a test breaks, and what their ranks say of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.paths import ROOT
from tests.stress import warm

PROGRAM = "tests/stress/chaos_rank.py"
PASSED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # as docs/faults.md has it
LIMIT = 240.0
"""Seconds for anything to come."""

TORCHRUN, IN_JOB, SCRIPT = "torchrun", "torchrun --max-restarts", "scripts/launch.sh"
"""What starts a run: only the first does not start it again by itself."""

Event = dict[str, Any]


class Launch:
    """A run that was started, by whatever of the three.

    Attributes:
        folder: of the run's `steps` and `events`; each launch has an output of its own in it.
        how: it was started.
        began: when its ranks could begin, by the clock.
    """

    def __init__(self, folder: Path, how: str, ranks: int, flags: Sequence[str]) -> None:
        self.folder, self.how, self.began = folder, how, time.time()
        folder.mkdir(exist_ok=True)
        self._seen = self._size()
        self._gone: set[int] = set()
        self._output = folder / f"output-{len(list(folder.glob('output-*')))}"
        variables = {"CHAOS": str(folder)}
        self._process: Any
        if how == SCRIPT:
            given = {**os.environ, **variables, "GPUS_PER_NODE": str(ranks), "RESTARTS": "100"}
            with open(self._output, "w") as stream:
                self._process = subprocess.Popen(
                    ["bash", "scripts/launch.sh", PROGRAM, *flags],
                    cwd=ROOT,
                    env=given,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        else:
            words = ["--standalone", "--nproc-per-node", str(ranks)]
            words += ["--signals_to_handle", PASSED_ON, "--shutdown-timeout", "120"]
            words += ["--max-restarts", "100"] if how == IN_JOB else []
            words += [str(ROOT / PROGRAM), *flags]
            self._process = warm.start(words, self._output, variables)

    @property
    def pid(self) -> int:
        """Of what is told to stop."""
        return int(self._process.pid)

    def events(self) -> list[Event]:
        """Of this launch, so far."""
        with suppress(FileNotFoundError), open(self.folder / "events") as stream:
            stream.seek(self._seen)
            return [json.loads(line) for line in stream.read().splitlines(keepends=False)]
        return []

    def _size(self) -> int:
        with suppress(FileNotFoundError):
            return (self.folder / "events").stat().st_size
        return 0

    def of(self, what: str) -> list[Event]:
        """Of the ranks that were started last."""
        return [
            event
            for event in self.events()
            if event["what"] == what and event["pid"] not in self._gone
        ]

    def pids(self) -> dict[int, int]:
        """Rank to process, of those started last."""
        return {event["rank"]: event["pid"] for event in self.of("rank")}

    def torchrun(self) -> int:
        """The process that the ranks are children of."""
        return psutil.Process(next(iter(self.pids().values()))).ppid()

    def is_running(self) -> bool:
        if self.how == SCRIPT:
            return self._process.poll() is None
        return bool(self._process.is_alive())

    def wait_for(self, come: Callable[[], Any], what: str) -> None:
        """Until it has come, or the launch has ended.

        Raises:
            AssertionError: neither did in time; has the output.
        """
        deadline = time.monotonic() + LIMIT
        while not come() and self.is_running():
            assert time.monotonic() < deadline, f"{what} has not come:\n{self.output()}"
            time.sleep(0.01)

    def wait_for_end(self, pids: Sequence[int], launcher: bool) -> None:
        """Until these processes are gone, and the launcher too if that is asked for."""
        deadline = time.monotonic() + LIMIT
        while any(map(lives, pids)) or (launcher and self.is_running()):
            assert time.monotonic() < deadline, f"processes have not ended:\n{self.output()}"
            time.sleep(0.01)

    def renew(self, pids: Sequence[int]) -> None:
        """Ranks that are gone; others may follow."""
        self._gone.update(pids)
        self.began = time.time()

    def output(self) -> str:
        text = self._output.read_text()
        return text[-6000:]

    def mark(self) -> int:
        """Where the output ends now."""
        return self._output.stat().st_size if self._output.exists() else 0

    def codes(self, pids: Sequence[int], mark: int) -> set[int]:
        """What ranks have ended with, by their own words and by torchrun's report behind a mark."""
        said = self._output.read_bytes()[mark:].decode(errors="replace")
        report = re.findall(r"^ *exitcode +: (-?\d+)", said, re.MULTILINE)
        own = {event["code"] for event in self.events() if "code" in event and event["pid"] in pids}
        return {int(code) for code in report} | own

    def kill(self) -> None:
        """Whatever is left of it."""
        for pid in [*self.pids().values(), self.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def lives(pid: int) -> bool:
    """Whether a process is there; one that nobody waits for is not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def launched(*args: Any) -> Iterator[Launch]:
    launch = Launch(*args)
    try:
        yield launch
    finally:
        launch.kill()
