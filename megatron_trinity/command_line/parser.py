"""The parser of a command line, and the checks that several have."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_trinity.errors import UsageError


def command_parser(
    description: str | None, example: str, *, allow_abbrev: bool = True
) -> argparse.ArgumentParser:
    """A parser whose `--help` prints a script's docstring and its example as they are written.

    Args:
        allow_abbrev: take unique beginnings of flags; not where unknown flags are passed on.
    """
    return argparse.ArgumentParser(
        description=description,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=allow_abbrev,
    )


def require_at_least_one(flag: str, number: int | None) -> None:
    """Check a count; one that is not given is fine.

    Raises:
        UsageError: it is below 1.
    """
    if number is not None and number < 1:
        raise UsageError(f"{flag} {number}: use 1 or more")


def require_parent(flag: str, file: Path | None) -> None:
    """Check before long work that its result can be written; a file that is not given is fine.

    Raises:
        UsageError: the directory that `file` is in does not exist.
    """
    if file is not None and not file.parent.is_dir():
        raise UsageError(f"{flag}: {file.parent} is no directory")
