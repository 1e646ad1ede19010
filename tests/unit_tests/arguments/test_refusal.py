"""A message of the tables of refusals, as it is told and as it is printed."""

from __future__ import annotations

import argparse
import re
from argparse import Namespace

import pytest

from megatron_trinity.arguments.cuda import CUDA_ONLY
from megatron_trinity.arguments.model import REPLACED_REFUSALS
from megatron_trinity.arguments.numbers import LEAST_REFUSALS
from megatron_trinity.arguments.parse import SUBJECTS
from megatron_trinity.arguments.refusal import Refusal, printed, refuse
from megatron_trinity.arguments.refusals import REFUSALS
from megatron_trinity.arguments.schedule import TOKEN_REFUSALS
from megatron_trinity.errors import UsageError

MESSAGES = {
    **{row.name: row.message for row in (*REFUSALS, *REPLACED_REFUSALS, *TOKEN_REFUSALS)},
    **{row.name: row.message for row in LEAST_REFUSALS},
    **{rule.flag: f"{{{rule.flag}}}: {rule.instead}" for rule in CUDA_ONLY},
}
MARKED = re.compile(r"`(--[^`]*)`")
FLAG = re.compile(r"(?<![\w-])--[\w-]+")


@pytest.fixture(scope="module")
def options() -> set[str]:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser())
    for add in SUBJECTS:
        add(parser)
    return set(parser._option_string_actions)


@pytest.mark.parametrize("name", MESSAGES)
def test_a_row_prints_right(name: str, options: set[str]) -> None:
    text = printed(MESSAGES[name])
    assert FLAG.findall(text) == MARKED.findall(text), "a flag that is not marked whole"
    assert set(MARKED.findall(text)) <= options, "a flag that no parser has"
    assert not re.search(r"[{}|\n]|  |\s[,;:.]|\b(not|than|and|or|of|use)\s*[,;:]|[,;:]$", text)
    assert text.count("`") % 2 == 0


def test_no_two_rows_have_a_name() -> None:
    rows = (*REFUSALS, *REPLACED_REFUSALS, *TOKEN_REFUSALS, *LEAST_REFUSALS)
    assert len({row.name for row in rows}) == len(rows)


def test_told_with_values_and_printed_without() -> None:
    row = Refusal(
        "example",
        lambda a: a.fp8 is not None,
        "{--fp8=} on {world_size|the} ranks; leave out {--fp8-param-gather}",
    )
    args = Namespace(fp8="e4m3", world_size=8)
    assert row.told(args) == "--fp8 e4m3 on 8 ranks; leave out --fp8-param-gather"
    assert row.printed() == "`--fp8` on the ranks; leave out `--fp8-param-gather`"
    with pytest.raises(UsageError, match="--fp8 e4m3 on 8 ranks"):
        refuse(args, (row,))
    refuse(Namespace(fp8=None), (row,))


def test_a_message_starts_with_a_capital() -> None:
    assert Refusal("example", lambda a: True, "{n|the} ranks").printed() == "The ranks"


def test_what_is_missing_is_told_and_all_is_printed() -> None:
    row = Refusal("example", lambda a: True, "give {missing: --fp8 --fp4-format --seed}")
    args = Namespace(fp8=None, fp4_format="e2m1", seed=None)
    assert row.told(args) == "give --fp8, --seed"
    assert row.printed() == "Give `--fp8`, `--fp4-format`, `--seed`"
