"""Dependence goes one way: docs/developing.md lists the floors, and no import goes up."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT

PACKAGE = "megatron_trinity"


def floors() -> dict[str, int]:
    """Name to floor, counted from the bottom."""
    text = (ROOT / "docs/developing.md").read_text()
    listed = text.split("## Order of imports")[1].split("```")[1].strip().splitlines()
    return {
        name: floor for floor, names in enumerate(reversed(listed)) for name in names.split(", ")
    }


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
    for path in (ROOT / PACKAGE).rglob("*.py"):
        first = path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")
        if first != "__init__":
            yield first, path
    for folder in ("tools", "benchmarks", "examples"):
        yield from ((folder, path) for path in (ROOT / folder).glob("*.py"))
    yield "pretrain_trinity", ROOT / "pretrain_trinity.py"


def climbing(files: Iterator[tuple[str, Path]], floors: dict[str, int]) -> list[str]:
    return [
        f"{path}: {name} imports {other}"
        for name, path in files
        for other in imported(path.read_text())
        if other != name and floors[other] >= floors[name]
    ]


def test_no_import_goes_up() -> None:
    assert climbing(files(), floors()) == []


def test_every_name_is_listed_once() -> None:
    names = {name for name, _ in files()}
    assert names == set(floors())
    assert all(" " not in name for name in floors())


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from megatron_trinity.b.x import y", "b"),
        ("from megatron_trinity import b", "b"),
        ("import megatron_trinity.b", "b"),
        ("def f():\n    from megatron_trinity.b import y", "b"),
        ("import megatron_trinity\nfrom megatron.core import x\nfrom . import z", None),
    ],
)
def test_every_form_of_import_is_seen(source: str, name: str | None, tmp_path: Path) -> None:
    assert list(imported(source)) == [name] * (name is not None)
    file = tmp_path / "f.py"
    file.write_text(source)
    for here, there, found in ((0, 1, True), (0, 0, True), (1, 0, False)):
        climbs = climbing(iter([("a", file)]), {"a": here, "b": there})
        assert bool(climbs) == (found and name is not None)
