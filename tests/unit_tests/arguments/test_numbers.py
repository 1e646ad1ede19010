"""Numbers out of their range: the table has the right arguments, and each row is told."""

from __future__ import annotations

import argparse
import math
from typing import Any

import pytest

from megatron_trinity.arguments.numbers import LEAST, LEAST_REFUSALS
from megatron_trinity.arguments.parse import standard_parser
from megatron_trinity.arguments.refusal import refuse
from megatron_trinity.errors import UsageError

SMALLEST = {"use 1 or more": 1, "use 1 or more, or leave it out": 1, "use 0 or more": 0}
"""Of a row the smallest number that it takes; the other row takes what is above 0."""

ROWS = [(flag, use) for use, (_, flags) in LEAST.items() for flag in flags.split()]


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return standard_parser(add_megatron_arguments(argparse.ArgumentParser()))


def check(parser: argparse.ArgumentParser, flag: str, number: float) -> None:
    refuse(parser.parse_args([flag, str(number)]), LEAST_REFUSALS)


def test_nothing_given_is_in_range(parser: argparse.ArgumentParser) -> None:
    refuse(parser.parse_args([]), LEAST_REFUSALS)


@pytest.mark.parametrize(("flag", "use"), ROWS)
def test_below_the_range_is_refused(parser: argparse.ArgumentParser, flag: str, use: str) -> None:
    smallest = SMALLEST.get(use)
    kind: Any = parser._option_string_actions[flag].type
    for number in (-1, -7) if smallest == 0 else (0, -7):
        with pytest.raises(UsageError) as refused:
            check(parser, flag, number)
        assert str(refused.value) == f"{flag} {kind(number)}: {use}"
    check(parser, flag, 1 if smallest is None else smallest)
    if kind is float:
        with pytest.raises(UsageError, match=f"{flag} nan"):
            check(parser, flag, math.nan)


@pytest.mark.parametrize(("flag", "use"), ROWS)
def test_what_can_be_left_out_is_out_by_default(
    parser: argparse.ArgumentParser, flag: str, use: str
) -> None:
    if "leave it out" in use:
        assert parser.parse_args([]).__dict__[parser._option_string_actions[flag].dest] is None
