"""Errors that are told to the user in one line, and the exit codes that go with them."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

TRACEBACK = "MEGATRON_TRINITY_TRACEBACK"
"""Environment variable that, if set, shows the traceback behind an error; for developers."""

RANK_0_FIRST = 5.0
"""Seconds that the other ranks leave to rank 0 to report an error that all of them met."""


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
    while was alone with its error, and prints it.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(RANK_0_FIRST)
        print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)


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
    sys.exit(0)
