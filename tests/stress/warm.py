"""torchrun without the imports: it is a fork of a process that has done them, as are its ranks.

What torchrun is, torch's own agent, rendezvous, report and signals, is as ever; its ranks are its
children. They alone begin by a fork where they begin by a new interpreter else, which saves ten
seconds of a processor for each of them.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any, NoReturn

from tests.paths import ROOT

ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",  # else gloo looks up the host's own name, which need not resolve
}


def start(words: Sequence[str], output: Path, variables: Mapping[str, str]) -> BaseProcess:
    """torchrun with these words, and its output there; `os.environ` is to have `ENVIRONMENT`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    process = context.Process(target=_torchrun, args=(list(words), output, dict(variables)))
    process.start()
    return process


def _torchrun(words: list[str], output: Path, variables: dict[str, str]) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    os.setsid()
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(variables)
    setattr(SubprocessHandler, "_popen", lambda _, words, variables: Fork(words, variables))
    run.main(words)


class Fork:
    """What torch asks of a `Popen`, for a program that runs in a fork of this process."""

    def __init__(self, words: Sequence[str], variables: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(words[words.index("-u") + 1 :], variables)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutExpired([str(self.pid)], timeout or 0.0)
            time.sleep(0.02)
        return code


def _become(words: Sequence[str], variables: Mapping[str, str]) -> NoReturn:
    """Run the program as an interpreter of its own would, and end as that does."""
    code: Any = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        atexit._clear()  # what the agent has registered
        os.environ.clear()
        os.environ.update(variables)
        multiprocessing.set_start_method("fork", force=True)  # what data loaders and writers do
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as done:
        code = done.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # No more: this process has the agent's objects too, whose threads it has not.
        os._exit(code)
