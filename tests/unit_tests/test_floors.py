"""Dependence goes one way: docs/developing.md lists the floors, and no import goes up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.imports import files, floors, imported


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
