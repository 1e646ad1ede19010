"""What docs/differences.md says a run has where the report leaves a value open."""

from __future__ import annotations

import argparse
import re

import pytest

from megatron_trinity.arguments.parse import standard_parser
from megatron_trinity.arguments.presets import apply_preset
from tests.paths import ROOT

PRESETS = ("nano", "mini", "large")


def given() -> list[tuple[str, str]]:
    """Preset and flag with its value, of every code span of the last column."""
    page = (ROOT / "docs/differences.md").read_text()
    table = page.split("## Open in the report")[1].split("\n## ")[0]
    found: list[tuple[str, str]] = []
    for row in table.splitlines():
        cells = row.strip("| ").split(" | ")
        if len(cells) != 3 or cells[2].startswith("none"):
            continue
        for span in re.findall(r"`(--[^`]+)`", cells[2]):
            of_one = re.match(r"--preset (\S+) (.+)", span)
            presets = (of_one[1],) if of_one else PRESETS
            found.extend((preset, of_one[2] if of_one else span) for preset in presets)
    return found


def parser_with(preset: str) -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    plain = add_megatron_arguments(argparse.ArgumentParser())
    megatron = {*plain._option_string_actions}
    parser = standard_parser(plain)
    apply_preset(parser, preset, {*parser._option_string_actions} - megatron)
    return parser


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_has_what_the_page_says(preset: str) -> None:
    parser = parser_with(preset)
    flags = [flag for of, flag in given() if of == preset]
    assert len(flags) > 20
    nothing = vars(parser.parse_args([]))
    for flag in flags:
        assert vars(parser.parse_args(flag.split())) == nothing, flag
