"""The numbers of a tokenizer's files against the tokenizer that Megatron makes of them."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_trinity.data.tokenizer import save_tokenizer, train_tokenizer
from megatron_trinity.upstream.quick_tokenizer import numbers_of
from tests.distributed.pool import RankPools

CONFIG, NAMES = "tokenizer_config.json", "special_tokens_map.json"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["the experts answer 12345 tokens. " * 3], 300), directory)
    return directory


def megatrons(rank: int, world_size: int, folder: Path) -> tuple[int, int | None, int | None]:
    from megatron.core.tokenizers import MegatronTokenizer

    made: Any = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(folder), metadata_path={"library": "huggingface"}
    )
    return made.vocab_size, made.eod, made.pad


def rewritten(folder: Path, name: str, **values: object) -> None:
    """Set keys of a JSON file; None takes one out."""
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def _without_end(folder: Path) -> None:
    for name in (CONFIG, NAMES):
        rewritten(folder, name, eos_token=None)


def _without_padding(folder: Path) -> None:
    for name in (CONFIG, NAMES):
        rewritten(folder, name, pad_token=None)


def _separator_for_end(folder: Path) -> None:
    _without_end(folder)
    rewritten(folder, CONFIG, sep_token="<|im_end|>")


def _token_as_entry(folder: Path) -> None:
    (folder / NAMES).unlink()
    rewritten(folder, CONFIG, eos_token={"content": "<|im_end|>", "__type": "AddedToken"})


SAME: dict[str, Callable[[Path], None]] = {
    "as trained": lambda folder: None,
    "no end": _without_end,
    "no padding": _without_padding,
    "a separator for the end": _separator_for_end,
    "a token as an entry": _token_as_entry,
    "another name of the class": lambda folder: rewritten(
        folder, CONFIG, tokenizer_class="TokenizersBackend"
    ),
    "no second file of names": lambda folder: (folder / NAMES).unlink(),
}

LEFT: dict[str, Callable[[Path], None]] = {
    "a token that is not there": lambda folder: rewritten(folder, CONFIG, mask_token="<|mask|>"),
    "an added token": lambda folder: rewritten(
        folder, CONFIG, added_tokens_decoder={"300": {"content": "<|more|>"}}
    ),
    "a file of added tokens": lambda folder: rewritten(folder, "added_tokens.json", more=300),
    "names that differ": lambda folder: rewritten(folder, NAMES, eos_token="<|im_end|>"),
    "a class with code": lambda folder: rewritten(folder, CONFIG, tokenizer_class="LlamaTokenizer"),
    "no class": lambda folder: rewritten(folder, CONFIG, tokenizer_class=None),
    "a damaged file": lambda folder: rewritten(folder, "tokenizer.json", model=None),
    "no file": lambda folder: (folder / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("case", SAME)
def test_numbers_are_megatrons(ranks: RankPools, trained: Path, tmp_path: Path, case: str) -> None:
    folder = shutil.copytree(trained, tmp_path / "tokenizer")
    SAME[case](folder)
    numbers = numbers_of(folder)
    assert numbers is not None
    found = (numbers.vocab_size, numbers.eod, numbers.pad)
    assert found == ranks.run(megatrons, folder, world_size=1)[0]
    assert numbers.eos == numbers.eod


@pytest.mark.parametrize("case", LEFT)
def test_what_may_be_more_than_its_file_is_left_to_megatron(
    trained: Path, tmp_path: Path, case: str
) -> None:
    folder = shutil.copytree(trained, tmp_path / "tokenizer")
    LEFT[case](folder)
    assert numbers_of(folder) is None


def built(rank: int, world_size: int, folder: Path, flags: dict[str, object]) -> tuple[str, int]:
    """The class of the tokenizer that Megatron's set-up makes, and its number of entries."""
    from megatron.training import global_vars

    args = Namespace(
        rank=0,
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(folder),
        metadata_path=None,
        vocab_file=None,
        merge_file=None,
        chat_template=None,
        special_tokens=None,
        tokenizer_hf_no_use_fast=False,
        tokenizer_hf_no_include_special_tokens=False,
        trust_remote_code=False,
        pad_vocab_size=False,
    )
    vars(args).update(flags)
    made = global_vars.build_tokenizer(args)
    return type(made).__name__, made.vocab_size


def test_flags_that_change_a_tokenizer_are_left_to_megatron(
    ranks: RankPools, trained: Path
) -> None:
    numbers = numbers_of(trained)
    assert numbers is not None
    size = numbers.vocab_size
    assert ranks.run(built, trained, {}, world_size=1)[0] == ("TokenizerNumbers", size)
    for flag, value, more in (
        ("special_tokens", ["<|more|>"], 1),
        ("tokenizer_hf_no_use_fast", True, 0),
    ):
        found = ranks.run(built, trained, {flag: value}, world_size=1)[0]
        assert found == ("DefaultTokenizerText", size + more)
