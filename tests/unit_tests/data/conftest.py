"""A small tokenizer and a small corpus that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_trinity.data.tokenizer import save_tokenizer, train_tokenizer

WORDS = "the router sends 1234567 tokens to the experts, and the experts' answers come back. "


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer([WORDS * 3, "def f(x):\n    return x\n" * 3], 300), directory)
    return directory


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty documents of different lengths, in a directory with two levels."""
    root = tmp_path / "corpus"
    for number in range(40):
        path = root / f"part{number % 3}" / f"{number:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {number}: " + WORDS * (1 + number % 7), encoding="utf-8")
    return root
