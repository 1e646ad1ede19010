"""Errors that are told to the user in one line, and the exit codes that go with them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn, TextIO

from megatron_trinity.exits import BAD_STEP, FAILED, NOBODY_READS, REWIND, USAGE, tell

TRACEBACK = "MEGATRON_TRINITY_TRACEBACK"
"""Environment variable that, if set, shows the traceback behind an error; for developers."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable in which torchrun names a file; its report ends with what stands there."""

RANK_0_FIRST = 5.0
"""Seconds that a rank leaves to the one that has met the cause, for an error of all: rank 0."""


OF_THIS_RANK = "of_this_rank"
"""Attribute of an error that is known not to come from the end of another rank."""


class TrinityError(Exception):
    """A check or a run failed for a reason the user can act on.

    The message is one line: what is wrong, where, and what to do about it.
    """

    exit_code = FAILED


class UsageError(TrinityError):
    """The command line, a preset or the launch does not make sense as given."""

    exit_code = USAGE


class StepError(TrinityError):
    """A training step has a result that must not be applied, such as NaN."""

    exit_code = BAD_STEP


class Stopped(Exception):
    """A run leaves since it was told to, or since a rank is gone.

    Args:
        line: is told once a launch; "" for nothing.
        exit_code: the same on every rank.
        by_any: whether this rank is the one that tells it; else rank 0 is.
    """

    def __init__(self, line: str, exit_code: int, by_any: bool = False) -> None:
        super().__init__(line)
        self.exit_code, self.by_any = exit_code, by_any


class SpikeError(StepError):
    """A run ends at a spike, and its next start leaves the data out that led there."""

    exit_code = REWIND


class DataError(TrinityError):
    """Something in the data, met by a process that reads it ahead."""

    def __init__(self, message: str) -> None:
        """torch hands over an error of a worker with the worker's traceback before the message."""
        super().__init__(message.strip().splitlines()[-1].split(f"{type(self).__name__}: ")[-1])


def root_cause(error: BaseException) -> str:
    """What went wrong at the bottom of `error`, the innermost of its causes, in one line."""
    failures = getattr(
        error, "failures", None
    )  # of torch's CheckpointException: rank to (error, ...)
    if failures:
        return root_cause(next(iter(failures.values()))[0])
    cause = error.__cause__ or error.__context__
    if cause is not None:
        return root_cause(cause)
    return " ".join(str(error).split()) or type(error).__name__


def report_error(error: TrinityError) -> None:
    """Print `error` once a launch, though every rank may have met it.

    Rank 0 prints at once. The launcher then ends the other ranks; one that is still there after a
    while was alone with its error, and prints it. torchrun gets the line too, for its own report.
    """
    rank = os.environ.get("RANK", "0")
    line = f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}"
    if rank != "0":
        time.sleep(RANK_0_FIRST)
    _tell_launcher(line)
    print(line, file=sys.stderr, flush=True)


def _tell_launcher(line: str) -> None:
    """Leave the line where torchrun looks for the traceback of a rank that has failed."""
    place = os.environ.get(ERROR_FILE)
    if place is None:
        return
    extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
    # The line is printed in any case, so a disk that is full takes nothing away.
    with contextlib.suppress(OSError), open(place, "w") as file:
        json.dump({"message": {"message": line, "extraInfo": extra}}, file)


def run_command(main: Callable[[], None], end: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Run a command's `main` and exit: 0 done, 1 failed, 2 usage, 3 bad step, 130 interrupted.

    Where nobody reads the output any more, as behind `| head`, the command ends with 141, and says
    so only to the launcher that has started it as a rank. `end` ends the process.
    """
    code = _run(main)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left goes nowhere, in place of into one more error when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or NOBODY_READS
    tell(code)
    end(code)


def _run(main: Callable[[], None]) -> int:
    """The exit code that `main` ends with; an error that is the user's is reported."""
    try:
        main()
    except TrinityError as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        report_error(error)
        return error.exit_code
    except Stopped as stopped:
        if str(stopped) and (stopped.by_any or os.environ.get("RANK", "0") == "0"):
            print(stopped, file=sys.stderr, flush=True)
        return stopped.exit_code
    except KeyboardInterrupt:
        return 130
    except SystemExit as done:
        if isinstance(done.code, str):
            raise
        return done.code or 0
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads(sys.stdout):
            if "RANK" in os.environ:
                report_error(TrinityError("nobody reads the output any more; use a file for it"))
            return NOBODY_READS
        # Where another rank is gone this one fails as well, with a traceback that says nothing of
        # the cause. By then the launcher knows of the other, and ends this rank before it speaks.
        if os.environ.get("WORLD_SIZE", "1") != "1" and not hasattr(error, OF_THIS_RANK):
            time.sleep(RANK_0_FIRST)
        raise
    return 0


def _nobody_reads(stream: TextIO) -> bool:
    """Whether `stream` is a pipe whose other end is closed: other pipes of a process may break."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
