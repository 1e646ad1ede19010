"""What a row of a table of refusals is: told in the terminal, and printed in the guide."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_trinity.errors import UsageError

_PART = re.compile(
    r"\{(?:(?P<flag>--[a-z0-9][a-z0-9-]*)(?P<valued>=?)|(?P<dest>\w+)\|(?P<words>[^{}]+)"
    r"|missing: (?P<missing>[^{}]+))\}"
)


@dataclass(frozen=True)
class Refusal:
    """A combination of arguments that is refused at start.

    Attributes:
        name: short and stable, for tests and docs.
        applies: whether parsed arguments ask for it.
        message: what is wrong, and what to use instead. `{--flag}` stands for a flag, `{--flag=}`
            for a flag and the value that it has, `{dest|words}` for the value of an argument, in
            the guide for words, and `{missing: flags}` for those of the flags that have no value,
            in the guide for all of them.
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
        if part["missing"]:
            flags = part["missing"].split()
            return ", ".join(flag for flag in flags if _value(args, flag) is None)
        flag = part["flag"]
        return f"{flag} {_value(args, flag)}" if part["valued"] else flag

    return _PART.sub(value, message)


def printed(message: str) -> str:
    """The same in Markdown, for whatever values."""

    def shown(part: re.Match[str]) -> str:
        if part["words"]:
            return part["words"]
        flags = (part["missing"] or part["flag"]).split()
        return ", ".join(f"`{flag}`" for flag in flags)

    return _PART.sub(shown, message)


def dest_of(flag: str) -> str:
    """The attribute of parsed arguments that a flag sets, but for the few with another name."""
    return flag.removeprefix("--").replace("-", "_")


def word_of(value: object) -> str:
    """The value as a command line has it: of an enumeration, the name."""
    return str(getattr(value, "name", value))


def _value(args: Namespace, flag: str) -> object:
    return getattr(args, dest_of(flag))
