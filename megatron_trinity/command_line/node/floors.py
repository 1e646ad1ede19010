"""The floors of the package, and those of a user's file over them."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_trinity.command_line.node.finding import Floors
from megatron_trinity.errors import UsageError

FLOORS = Path(__file__).with_name("floors.yaml")


def read_floors(file: Path | None) -> Floors:
    """What a node has to reach.

    Raises:
        UsageError: the file cannot be read, or has a name that there is not.
    """
    floors: Floors = yaml.safe_load(FLOORS.read_text())
    if file is None:
        return floors
    try:
        given = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"--floors {file}: {error}") from error
    if not isinstance(given, dict):
        raise UsageError(f"--floors {file}: no block of names and values")
    if unknown := given.keys() - floors.keys():
        raise UsageError(f"--floors {file}: no such name: {', '.join(sorted(unknown))}")
    return floors | given
