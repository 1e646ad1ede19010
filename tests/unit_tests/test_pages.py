"""The pages that are printed from tables are what the tables say."""

from __future__ import annotations

import pytest

from tests.pages import pages


@pytest.mark.parametrize(
    ("path", "text"), list(pages()), ids=lambda value: getattr(value, "name", "")
)
def test_a_page_is_its_table(path: object, text: str) -> None:
    from pathlib import Path

    assert isinstance(path, Path)
    assert path.read_text() == text, "run `python -m tests.pages`"
