"""Errors that are told to the user in one line, and the exit codes that go with them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

TRACEBACK = "MEGATRON_TRINITY_TRACEBACK"
"""Environment variable that, if set, shows the traceback behind an error; for developers."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable in which torchrun names a file; its report ends with what stands there."""

RANK_0_FIRST = 5.0
"""Seconds that a rank leaves to the one that has met the cause, for an error of all: rank 0."""


class TrinityError(Exception):
    """A check or a run failed for a reason the user can act on.

    The message is one line: what is wrong, where, and what to do about it.
    """

    exit_code = 1


class UsageError(TrinityError):
    """The command line, a preset or the launch does not make sense as given."""

    exit_code = 2


class StepError(TrinityError):
    """A training step has a result that must not be applied, such as NaN."""

    exit_code = 3


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


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's `main` and exit: 0 done, 1 failed, 2 usage, 3 bad step, 130 interrupted."""
    try:
        main()
    except TrinityError as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        report_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        # Where another rank is gone this one fails as well, with a traceback that says nothing of
        # the cause. By then the launcher knows of the other, and ends this rank before it speaks.
        if os.environ.get("WORLD_SIZE", "1") != "1":
            time.sleep(RANK_0_FIRST)
        raise
    sys.exit(0)
