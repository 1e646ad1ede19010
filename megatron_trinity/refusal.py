"""What a row of the table of refusals is."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """A combination of arguments that is refused at start.

    Attributes:
        name: short and stable, for tests and docs.
        applies: whether parsed arguments ask for it.
        message: format string over the arguments: what is wrong, and what to use instead.
    """

    name: str
    applies: Callable[[Namespace], bool]
    message: str
