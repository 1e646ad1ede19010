from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_trinity.data.tokenizer import (
    ISOLATED_RANGES,
    MIN_VOCAB_SIZE,
    SPECIAL_TOKENS,
    TokenizerRequest,
    build_pre_tokenizer,
    make_tokenizer,
    train_tokenizer,
)
from megatron_trinity.errors import TrinityError, UsageError
from tests.paths import ROOT

PRE_TOKENIZER = build_pre_tokenizer()


def pieces(text: str) -> list[str]:
    """The pieces of `text` as characters. Offsets, because the pieces themselves are bytes."""
    return [text[start:end] for _, (start, end) in PRE_TOKENIZER.pre_tokenize_str(text)]


def grouped(digits: str) -> list[str]:
    """Plain reference: groups of three from the right."""
    first = len(digits) % 3
    groups = [digits[i : i + 3] for i in range(first, len(digits), 3)]
    return [digits[:first], *groups] if first else groups


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", ["1"]),
        ("12", ["12"]),
        ("123", ["123"]),
        ("1234", ["1", "234"]),
        ("12345", ["12", "345"]),
        ("1234567", ["1", "234", "567"]),
        ("x1234y", ["x", "1", "234", "y"]),
        ("3.14159", ["3", ".", "14", "159"]),
        ("in 2024", ["in", " ", "2", "024"]),
        ("٠١٢٣", ["٠", "١٢٣"]),
        ("x²", ["x", "²"]),
    ],
)
def test_digit_groups(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected


@given(st.lists(st.text("0123456789٣५", min_size=1, max_size=40), min_size=1, max_size=4))
def test_digit_groups_against_reference(runs: list[str]) -> None:
    separated = [[*grouped(run), "a"] for run in runs]
    assert pieces("".join(run + "a" for run in runs)) == [p for group in separated for p in group]


def test_long_run_of_digits_takes_linear_time() -> None:
    digits = "7" * 400_001
    start = time.monotonic()
    found = pieces(digits)
    assert found == grouped(digits)
    assert time.monotonic() - start < 15  # a second; minutes if it were quadratic


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello world", ["Hello", " world"]),
        ("漢字kana", ["漢字", "kana"]),
        ("a漢字", ["a", "漢字"]),
        ("see 漢字かなカナ한국어", ["see", " ", "漢字かなカナ한국어"]),
        ("ok ລາວ ខ្មែរ", ["ok", " ", "ລາວ", " ", "ខ្មែរ"]),
        ("x.append(y)", ["x", ".append", "(y", ")"]),
        ("don't", ["don", "'t"]),
        ("snake_case", ["snake", "_case"]),
        ("end.\n\nNext", ["end", ".\n\n", "Next"]),
        ("a  b", ["a", " ", " b"]),
        ("a \n b", ["a", " \n", " b"]),
        ("if x:\n    y", ["if", " x", ":\n", "   ", " y"]),
        ("a + b", ["a", " +", " b"]),
        ("été à", ["été", " à"]),
        ("e\u0301t", ["e\u0301t"]),
        ("end   ", ["end", "   "]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected


@pytest.mark.parametrize(("low", "high"), ISOLATED_RANGES)
def test_isolated_scripts_at_their_borders(low: str, high: str) -> None:
    for first in (low, high):
        if first.isdecimal():  # digits go first: those of Myanmar, Lao and Khmer too
            continue
        assert pieces(f"ab{first}{first}cd")[:2] == ["ab", first * 2]
    assert pieces(f"é{chr(ord(low) - 1)}")[:1] != [f"é{low}"]


@given(st.text())
@example("<|im_end|> 12 <|end_of_text|>")
@example("a\r\n\r b \u2028\u00a0 . , ! n't 's")
def test_pieces_lose_nothing(text: str) -> None:
    # A character can be cut into the bytes of one piece only: pieces have whole characters.
    assert "".join(pieces(text)) == text


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    return loaded


def test_any_text_comes_back_exactly(tokenizer: PreTrainedTokenizerBase) -> None:
    @given(st.text(max_size=200))
    @example("".join(map(chr, range(0x250))))
    @example(" ,  . ' n't \r\n\t <|pad|> 🙂\u200d漢")
    def check(text: str) -> None:
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    check()


def test_ids_of_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert tokenizer.bos_token == "<|begin_of_text|>"
    assert tokenizer.eos_token == "<|end_of_text|>"
    assert tokenizer.pad_token == "<|pad|>"
    # Chat tokens are one token each, though nothing names them.
    assert tokenizer("<|im_start|>a<|im_end|>").input_ids[::2] == [2, 3]


def test_nothing_is_added_around_a_text(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer("").input_ids == []
    assert len(tokenizer("a").input_ids) == 1


@pytest.mark.parametrize("specials", [False, True])
def test_megatron_loads_it(
    tokenizer_dir: Path, tokenizer: PreTrainedTokenizerBase, specials: bool
) -> None:
    """The very function that Megatron's training calls, with what its parser gives it."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    arguments = Namespace(
        rank=0,
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(tokenizer_dir),
        metadata_path=None,
        vocab_file=None,
        merge_file=None,
        chat_template=None,
        special_tokens=["<|im_start|>", "<|im_end|>"] if specials else None,
        tokenizer_hf_no_use_fast=False,
        tokenizer_hf_no_include_special_tokens=False,
        trust_remote_code=False,
        pad_vocab_size=True,
        padded_vocab_size=None,
        make_vocab_size_divisible_by=128,
        tensor_model_parallel_size=2,
    )
    built = build_tokenizer(arguments)
    assert (built.vocab_size, built.bos, built.eod, built.pad) == (300, 0, 1, 4)
    assert arguments.padded_vocab_size == 512
    text = "the router sends 1234567 tokens\n"
    assert built.tokenize(text) == tokenizer(text).input_ids
    assert built.detokenize(built.tokenize(text)) == text


def test_merges_never_cross_a_digit_group() -> None:
    trained = train_tokenizer(["1234567 " * 50], 400)
    assert trained.encode("1234567").tokens == ["1", "234", "567"]
    assert trained.encode("234567").tokens == ["234", "567"]


def test_too_small_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match=f"a vocabulary of 260 is too small.*{MIN_VOCAB_SIZE}"):
        train_tokenizer(["a"], 260)
    assert train_tokenizer(["a"], MIN_VOCAB_SIZE).get_vocab_size() == 261


def run_tool(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "train_tokenizer.py", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_tool_writes_the_same_bytes_each_time(corpus: Path, tmp_path: Path) -> None:
    asked = ["--source", corpus, "--vocab-size", 400]
    first = run_tool(*asked, "--output", tmp_path / "a", RAYON_NUM_THREADS="1", PYTHONHASHSEED="1")
    second = run_tool(*asked, "--output", tmp_path / "b", RAYON_NUM_THREADS="3", PYTHONHASHSEED="2")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_manifest.json",
    ]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert "fewer than 400: the text is short" in first.stdout


def test_second_run_does_nothing_and_a_changed_one_is_refused(corpus: Path, tmp_path: Path) -> None:
    request = TokenizerRequest((str(corpus),), tmp_path / "out", 300)
    made, is_new = make_tokenizer(request)
    assert is_new
    written = (tmp_path / "out" / "tokenizer.json").stat().st_mtime_ns
    assert make_tokenizer(request) == (made, False)
    assert (tmp_path / "out" / "tokenizer.json").stat().st_mtime_ns == written

    other = replace(request, vocab_size=301)
    with pytest.raises(TrinityError, match=r"tokenizer.json.* is there already.*--overwrite"):
        make_tokenizer(other)
    assert make_tokenizer(request) == (made, False)
    assert make_tokenizer(replace(other, overwrite=True))[1]

    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    with pytest.raises(TrinityError, match="is there already"):
        make_tokenizer(other)


def test_validation_documents_are_not_trained_on(corpus: Path, tmp_path: Path) -> None:
    from megatron_trinity.data.documents import assign_split

    made, _ = make_tokenizer(
        TokenizerRequest((str(corpus),), tmp_path / "out", 300, valid_fraction=0.4)
    )
    names = [path.relative_to(corpus).as_posix() for path in corpus.rglob("*.txt")]
    seen = [name for name in names if assign_split(name, 0.4) == "train"]
    assert 0 < len(seen) < 40
    assert made["documents"] == len(seen)
    assert made["bytes"] == sum((corpus / name).stat().st_size for name in seen)


def test_tool_tells_mistakes_in_one_line(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for code, message, arguments in [
        (2, "source nowhere is not there", ["--source", "nowhere", "--output", out]),
        (1, "no documents to train on", ["--source", tmp_path / "empty", "--output", out]),
        (2, "too small", ["--source", corpus, "--output", out, "--vocab-size", 5]),
        (2, "inside source", ["--source", corpus, "--output", corpus / "x"]),
        (2, "not in [0, 1)", ["--source", corpus, "--output", out, "--valid-fraction", "1"]),
    ]:
        result = run_tool(*arguments)
        assert result.returncode == code
        (line,) = [text for text in result.stderr.splitlines() if not text.startswith("training a")]
        assert line.startswith("error: ")
        assert message in line
        assert not out.exists()


def test_help_has_an_example() -> None:
    result = run_tool("--help")
    assert result.returncode == 0
    assert "python tools/train_tokenizer.py --source python-stdlib" in result.stdout


def test_config_says_no_length_and_no_clean_up(tokenizer_dir: Path) -> None:
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    assert config["clean_up_tokenization_spaces"] is False
    assert config["model_max_length"] >= 10**30
