"""Megatron states its requirements as assertions, some without a message; users get one line.

Written for: megatron-core 0.19.2.
Remove when: its argument checks raise errors that are meant for users.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_trinity.errors import UsageError


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn a failed requirement of Megatron's inside the block into a `UsageError`.

    Args:
        what: what went wrong, to stand in front of Megatron's own words.
    """
    try:
        yield
    except (AssertionError, ValueError, RuntimeError, NotImplementedError) as error:
        raise UsageError(f"{what}: {requirement(error)}") from error


def requirement(error: BaseException) -> str:
    """The requirement that failed, in one line: the message, or the source line that asserts it."""
    message = " ".join(str(error).split())
    if message:
        return message
    source = (traceback.extract_tb(error.__traceback__)[-1].line or "").removeprefix("assert ")
    return f"Megatron requires `{_ARGUMENT.sub(_flag, source)}`"


_ARGUMENT = re.compile(r"\bargs\.(\w+)")


def _flag(argument: re.Match[str]) -> str:
    return "--" + argument[1].replace("_", "-")
