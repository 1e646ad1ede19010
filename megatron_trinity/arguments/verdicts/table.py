"""The verdicts on Megatron's flags, read from their tables, and what is refused by them."""

from __future__ import annotations

import argparse
import shlex
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from megatron_trinity.arguments.verdicts.examples import ALIASES, SAME_ANSWER, WORKS
from megatron_trinity.arguments.verdicts.needs_cuda import NEEDS_CUDA
from megatron_trinity.arguments.verdicts.refused import REFUSED
from megatron_trinity.errors import UsageError


@dataclass(frozen=True)
class Example:
    """How a flag that does something is tried.

    Attributes:
        words: the flag and a value.
        base: flags that the run without it has as well.
        needed: flags that it needs itself.
        ranks: of the run with it.
        shown_by: the test that tries it in place of a run of a few steps.
        untried: why nothing does.
    """

    words: tuple[str, ...]
    base: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    ranks: int = 1
    shown_by: str | None = None
    untried: str | None = None

    @property
    def flag(self) -> str:
        return self.words[0]


def _example(line: str) -> Example:
    words, *parts = (part.strip() for part in line.split(" ; "))
    fields: dict[str, Any] = {}
    for part in parts:
        kind, _, rest = part.partition(" ")
        if kind == "ranks":
            fields["ranks"] = int(rest)
        elif kind in ("shown", "untried"):
            fields[{"shown": "shown_by", "untried": "untried"}[kind]] = rest.partition(" ")[2]
        else:
            words_of = (shlex.split(ALIASES.get(word, word)) for word in shlex.split(rest))
            fields[{"with": "base", "and": "needed"}[kind]] = tuple(chain(*words_of))
    return Example(tuple(shlex.split(words)), **fields)


def works() -> list[Example]:
    """Flags that change what is computed."""
    return [_example(line) for line in WORKS.strip().splitlines()]


def same_answer() -> list[Example]:
    """Flags that change speed, memory, files or the log alone."""
    return [_example(line) for line in SAME_ANSWER.strip().splitlines()]


def refused() -> Iterator[tuple[str, str]]:
    """Flag and reason."""
    return ((flag, reason) for reason, flags in REFUSED.items() for flag in flags.split())


def needs_cuda() -> Iterator[tuple[str, str]]:
    """Flag, and what it is for."""
    return ((flag, use) for use, flags in NEEDS_CUDA.items() for flag in flags.split())


def standard_values(parser: argparse.ArgumentParser) -> dict[str, tuple[str, Any]]:
    """Flag to its argument and the value that leaves it alone, of those that may be refused."""
    nothing = parser.parse_args([])
    flags = [flag for flag, _ in (*refused(), *needs_cuda())]
    dests = {flag: parser._option_string_actions[flag].dest for flag in flags}
    return {flag: (dest, getattr(nothing, dest)) for flag, dest in dests.items()}


def off_standard(args: Namespace, standard: Mapping[str, tuple[str, Any]]) -> set[str]:
    """The flags whose argument has another value than it has without them."""
    return {flag for flag, (dest, value) in standard.items() if getattr(args, dest) != value}


def refuse_flags(given: set[str], cuda_available: bool, ruled: set[str]) -> None:
    """Refuse flags by their verdict.

    Args:
        given: by the command line or a preset.
        cuda_available: whether flags that need CUDA may be given.
        ruled: flags of which another rule says when they need CUDA.

    Raises:
        UsageError: the first that is refused, with the reason.
    """
    for flag, reason in refused():
        if flag in given:
            raise UsageError(f"{flag} is refused: {reason}; leave it out")
    for flag, _ in needs_cuda():
        if flag in given and not cuda_available and flag not in ruled:
            raise UsageError(f"{flag} needs CUDA, which this machine does not have; leave it out")
