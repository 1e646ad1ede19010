"""What a row of a table of refusals is: told in the terminal, and printed in the guide."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_trinity.errors import UsageError

_PART = re.compile(
    r"\{(?:(?P<flag>--[a-z0-9][a-z0-9-]*)(?P<valued>=?)|(?P<dest>\w+)\|(?P<words>[^{}]+))\}"
)


@dataclass(frozen=True)
class Refusal:
    """A combination of arguments that is refused at start.

    Attributes:
        name: short and stable, for tests and docs.
        applies: whether parsed arguments ask for it.
        message: what is wrong, and what to use instead. `{--flag}` stands for a flag, `{--flag=}`
            for a flag and the value that it has, and `{dest|words}` for the value of an argument,
            in the guide for words.
    """

    name: str
    applies: Callable[[Namespace], object]
    message: str

    def told(self, args: Namespace) -> str:
        """The message for the terminal, with the values of `args`."""
        return told(self.message, args)

    def printed(self) -> str:
        """The message in Markdown, for whatever values."""
        text = printed(self.message)
        return text[0].upper() + text[1:]


def refuse(args: Namespace, refusals: Iterable[Refusal]) -> None:
    """Refuse arguments that cannot work.

    Raises:
        UsageError: the first of `refusals` that applies.
    """
    for refusal in refusals:
        if refusal.applies(args):
            raise UsageError(refusal.told(args))


def told(message: str, args: Namespace) -> str:
    """A message of the form that `Refusal` describes, as text with the values of `args`."""

    def value(part: re.Match[str]) -> str:
        if part["dest"]:
            return str(getattr(args, part["dest"]))
        flag = part["flag"]
        if not part["valued"]:
            return flag
        return f"{flag} {getattr(args, flag.removeprefix('--').replace('-', '_'))}"

    return _PART.sub(value, message)


def printed(message: str) -> str:
    """The same in Markdown, for whatever values."""
    return _PART.sub(lambda part: part["words"] or f"`{part['flag']}`", message)
