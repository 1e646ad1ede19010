"""The exit codes of training: what a launcher has to do next depends on them."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

DONE, FAILED, USAGE, BAD_STEP = 0, 1, 2, 3
HUNG, REWIND, OUT_OF_TIME, TOO_LATE, PEER_LOST, LAUNCHER_LOST = 4, 5, 6, 7, 8, 9

NOBODY_READS = 141
"""Of a command whose output is read no longer, as of one that SIGPIPE has ended."""


def of_signal(number: int) -> int:
    """The code of a run that a signal has stopped, as shells have it."""
    return 128 + number


MEANINGS: dict[int, str] = {
    DONE: "trained to the end, or to `--exit-interval`",
    FAILED: "failed: one line says why, or a traceback",
    USAGE: "wrong usage",
    BAD_STEP: "a step whose result must not be applied",
    HUNG: "no step within `--hang-minutes`",
    REWIND: "a spike, with `--spike-action rewind`: the next start leaves that data out",
    OUT_OF_TIME: "`--exit-duration-in-mins` is over; saved",
    TOO_LATE: "told to stop, and not done within `--exit-within`; the checkpoint before is whole",
    PEER_LOST: "another rank has died; nothing saved",
    LAUNCHER_LOST: "the launcher has died; saved",
    of_signal(signal.SIGINT): "stopped by SIGINT; saved",
    of_signal(signal.SIGUSR1): "stopped by SIGUSR1; saved",
    NOBODY_READS: "the output is read no longer, as behind `| head`",
    of_signal(signal.SIGTERM): "stopped by SIGTERM; saved",
}
"""Code to what has happened. `--exit-signal` adds one. Before the first step nothing is saved."""

CODE_FILE = "MEGATRON_TRINITY_CODE_FILE"
"""Environment variable that names a file for the code, since a launcher has one of its own."""


def tell(code: int) -> None:
    """Write the code of rank 0 where the launcher looks for it, if it does."""
    path = os.environ.get(CODE_FILE)
    if path and os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # of a disk that is full: the launcher then has its own
            Path(path).write_text(f"{code}\n")


def end(code: int) -> NoReturn:
    """End this process as `sys.exit` would, but leave the interpreter and its objects as they are.

    To take apart what torch and megatron have made costs a second of a processor, on a busy machine
    many, for which the next start waits.
    """
    threading._shutdown()  # type: ignore[attr-defined] # waits for threads, as an interpreter does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
