"""Who imports whom: the floors of docs/developing.md, and the imports of every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.paths import ROOT

PACKAGE = "megatron_trinity"


def listed_floors() -> list[list[str]]:
    """Names by floor, from the top, as docs/developing.md lists them."""
    text = (ROOT / "docs/developing.md").read_text()
    listed = text.split("## Order of imports")[1].split("```")[1].strip().splitlines()
    return [names.split(", ") for names in listed]


def floors() -> dict[str, int]:
    """Name to floor, counted from the bottom."""
    return {name: floor for floor, names in enumerate(reversed(listed_floors())) for name in names}


def imported(source: str) -> Iterator[str]:
    """What of the package is imported, anywhere in a file, by its first name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            modules = [f"{PACKAGE}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            continue
        for module in modules:
            package, _, rest = module.partition(".")
            if package == PACKAGE and rest:
                yield rest.partition(".")[0]


def files() -> Iterator[tuple[str, Path]]:
    """Name and file of everything that the list is about."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        first = path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")
        if first != "__init__":
            yield first, path
    for folder in ("tools", "benchmarks", "examples"):
        yield from ((folder, path) for path in sorted((ROOT / folder).rglob("*.py")))
    yield "pretrain_trinity", ROOT / "pretrain_trinity.py"


def edges() -> dict[str, set[str]]:
    """Name to the other names that its files import."""
    found: dict[str, set[str]] = {name: set() for name in floors()}
    for name, path in files():
        found[name] |= set(imported(path.read_text())) - {name}
    return found
