"""Presets: YAML files of two blocks, `megatron:` and `trinity:`, each from flags to values."""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from megatron_trinity.errors import UsageError
from megatron_trinity.model.architecture import FIXED
from megatron_trinity.yaml_loader import LOADER

BLOCKS = ("megatron", "trinity")
_FILES = resources.files("megatron_trinity") / "presets"


def preset_names() -> list[str]:
    """The names that `--preset` takes."""
    files = _FILES.iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def add_preset_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag to `parser`."""
    parser.add_argument_group(title="trinity").add_argument(
        "--preset", metavar="NAME", help=f"{', '.join(preset_names())}, or a YAML file"
    )


def load_preset(name_or_path: str) -> dict[str, dict[str, Any]]:
    """Read a preset by its name, or by the path of a YAML file of one's own.

    Returns: block name to flag (without the dashes in front) to value.

    Raises:
        UsageError: there is no such preset, or it is not a preset.
    """
    if name_or_path in preset_names():
        text = (_FILES / f"{name_or_path}.yaml").read_text()
    elif name_or_path.endswith((".yaml", ".yml")) and Path(name_or_path).is_file():
        text = Path(name_or_path).read_text()
    else:
        raise UsageError(
            f"--preset {name_or_path}: no such preset; there are {', '.join(preset_names())}, "
            "or give the path of a YAML file"
        )
    try:
        preset = yaml.load(text, LOADER)
    except yaml.YAMLError as error:
        raise UsageError(
            f"preset {name_or_path} is not YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(preset, dict) or not all(isinstance(b, dict) for b in preset.values()):
        raise UsageError(f"preset {name_or_path} needs two blocks of flags, megatron: and trinity:")
    unknown = sorted(set(preset) - set(BLOCKS))
    if unknown:
        raise UsageError(
            f"preset {name_or_path}: unknown block {unknown[0]}; it has megatron: and trinity:"
        )
    return preset


def apply_preset(
    parser: argparse.ArgumentParser, name_or_path: str, trinity_flags: set[str]
) -> None:
    """Make the values of a preset the defaults of `parser`, so that the command line wins.

    Args:
        parser: has every Megatron and Trinity flag.
        name_or_path: the preset.
        trinity_flags: option strings that belong in the `trinity:` block.

    Raises:
        UsageError: a key is no flag, stands in the wrong block, or its value does not fit.
    """
    for block, flags in load_preset(name_or_path).items():
        for key, value in flags.items():
            option, where = f"--{key}", f"preset {name_or_path}, {block}: {key}"
            action = parser._option_string_actions.get(option)
            if action is None or (option in trinity_flags) != (block == "trinity"):
                raise UsageError(f"{where} is not a {block} flag")
            parser.set_defaults(**{action.dest: preset_default(action, option, value, where)})


def preset_default(action: argparse.Action, option: str, value: Any, where: str) -> Any:
    """The default that makes `action` behave as if the command line had given `value`.

    Raises:
        UsageError: the value does not fit; `where` says of what.
    """
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise UsageError(f"{where} is a switch; give true or false")
        return value
    if action.nargs == 0:
        if value is not True:
            if _is_on(action):
                raise UsageError(f"{where} {_cannot_be_off(action)}")
            raise UsageError(f"{where} is a switch; give true or leave it out")
        return action.const
    takes_list = action.nargs in ("*", "+")
    if isinstance(value, dict) or (isinstance(value, list) and not takes_list):
        raise UsageError(f"{where} cannot be {value!r}; give one value")
    try:
        if isinstance(value, list):
            return [_typed(action, item) for item in value]
        typed = _typed(action, value)
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise UsageError(f"{where} cannot be {value!r}: {error}") from error
    if action.choices is not None and typed not in action.choices:
        raise UsageError(f"{where} cannot be {value!r}; choose from {list(action.choices)}")
    return [typed] if takes_list else typed


def _is_on(action: argparse.Action) -> bool:
    """Whether `action` is a switch that is on without being given."""
    return action.nargs == 0 and action.const is not None and action.default == action.const


def _cannot_be_off(action: argparse.Action) -> str:
    why = "every Trinity model has it" if action.dest in FIXED else "it is on already"
    return f"cannot be turned off: {why}; leave it out"


def explain_negation(parser: argparse.ArgumentParser, message: str) -> str:
    """The message of `parser`, or a better one for a `--no-FLAG` of a switch that stays on."""
    words = message.removeprefix("unrecognized arguments: ").split()
    for word in words:
        option = word.replace("--no-", "--", 1)
        action = parser._option_string_actions.get(option)
        if option != word and action is not None and _is_on(action):
            return f"{word}: {option} {_cannot_be_off(action)}"
    return message


def _typed(action: argparse.Action, value: Any) -> Any:
    return action.type(str(value)) if callable(action.type) else value
