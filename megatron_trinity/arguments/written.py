"""The arguments of a run as a preset: `--preset arguments.yaml` gives them again."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_trinity.arguments.presets import preset_default
from megatron_trinity.errors import UsageError

Blocks = dict[str, dict[str, Any]]

NAME = "arguments.yaml"

_NOT_OF_A_RUN = {"help", "preset"}


def as_preset(
    parser: argparse.ArgumentParser,
    args: Namespace,
    defaults: Mapping[str, Any],
    trinity_flags: set[str],
) -> Blocks:
    """All that `args` says, in the blocks of a preset; a flag whose value is None is left out.

    Args:
        parser: has every flag.
        args: as parsed, before anything follows from them.
        defaults: argument to value, without a preset.
        trinity_flags: those of the `trinity:` block.
    """
    blocks: Blocks = {"megatron": {}, "trinity": {}}
    for action in parser._actions:
        if action.dest in _NOT_OF_A_RUN or not action.option_strings:
            continue
        value = getattr(args, action.dest)
        if value is None:
            continue
        option = max(action.option_strings, key=lambda name: name.startswith("--"))
        if action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction):
            if value != action.const or value == defaults[action.dest]:
                continue  # a switch that nobody has turned
            written: Any = True
        else:
            found = next(_written(action, option, value), None)
            if found is None:
                if value != defaults[action.dest]:
                    raise UsageError(f"{option} {value}: no preset can say this")
                continue
            written = found[0]
        block = "trinity" if option in trinity_flags else "megatron"
        blocks[block][option.removeprefix("--")] = written
    return blocks


def _written(action: argparse.Action, option: str, value: Any) -> Iterator[tuple[Any]]:
    """What YAML can hold, and a preset reads as `value`."""
    for candidate in (value, getattr(value, "name", None), str(value)):
        if not isinstance(candidate, str | int | float | list) or isinstance(candidate, bool) != (
            isinstance(value, bool)
        ):
            continue
        try:
            if preset_default(action, option, candidate, option) == value:
                # Of the types of YAML itself: an enumeration of integers is one as well.
                yield (_plain(candidate),)
        except UsageError:
            continue


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return next((kind(value) for kind in (bool, int, float, str) if isinstance(value, kind)), value)
