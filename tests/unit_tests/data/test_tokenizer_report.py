from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_trinity.data.documents import Document
from megatron_trinity.data.tokenizer import build_pre_tokenizer, train_tokenizer
from megatron_trinity.data.tokenizer_report import Sample, bytes_per_token, script_of


def document(text: str, name: str = "a", is_code: bool = False) -> Document:
    return Document(name, name, text, len(text.encode()), is_code)


@pytest.mark.parametrize(
    ("characters", "script"),
    [
        ("aéÿŁ", "Latin"),
        ("жЯ", "Cyrillic"),
        ("漢字", "Chinese characters"),
        ("かカ", "Kana"),
        ("한", "Hangul"),
        ("ع", "Arabic"),
        ("हि", "Devanagari"),
        ("07٣", "digits"),
        (" \n\u3000", "white space"),
        ("+_。😀", "punctuation and symbols"),
    ],
)
def test_scripts(characters: str, script: str) -> None:
    assert {script_of(character) for character in characters} == {script}


def test_bytes_a_token_of_bytes_alone() -> None:
    """Without a merge a token is a byte, whatever the script; white space counts with its word."""
    tokenizer = train_tokenizer(["x"], 261)
    sample = Sample()
    sample.offer(document("ab жЯ 漢 12 +\n"))
    sample.offer(document("def", "b", is_code=True))
    figures = bytes_per_token(tokenizer, sample)
    assert set(figures.values()) == {1.0}
    assert set(figures) == {
        "all", "Latin", "Cyrillic", "Chinese characters", "digits", "white space", "code",
        "punctuation and symbols",
    }  # fmt: skip


def test_bytes_a_token_of_known_merges() -> None:
    tokenizer = train_tokenizer(["router жара 漢字 "] * 50, 300)
    sample = Sample()
    text = "router жара"
    sample.offer(document(text))
    pieces = [piece for piece, _ in build_pre_tokenizer().pre_tokenize_str(text)]
    assert tokenizer.encode(text).tokens == pieces
    # "router" is a token of 6 bytes, " жара" one of 9: its space counts for it.
    assert bytes_per_token(tokenizer, sample) == {"all": 7.5, "Cyrillic": 9.0, "Latin": 6.0}
    assert bytes_per_token(tokenizer, Sample()) == {}


def test_sample_does_not_depend_on_the_order() -> None:
    documents = [document(f"text {i}", str(i)) for i in range(200)]
    chosen = []
    for seed in range(3):
        random.Random(seed).shuffle(documents)
        sample = Sample(documents=10, characters=6)
        for found in documents:
            sample.offer(found)
        chosen.append(sorted(sample.kept))
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(chosen[0]) == 10
    assert {len(text) for _, text, _ in chosen[0]} == {6}


def test_chat_template_and_special_tokens_in_text(tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert shown == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "split_special_tokens=True" in (tokenizer_dir / "README.md").read_text()
    raw = "a<|end_of_text|>b"
    assert 1 in tokenizer(raw).input_ids  # as the directory's README.md says
    kept = tokenizer(raw, split_special_tokens=True).input_ids
    assert 1 not in kept
    assert tokenizer.decode(kept) == raw
