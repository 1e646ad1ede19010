"""A training run reads of its tokenizer what it needs, and does without transformers."""

from __future__ import annotations

import functools
import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="quick-tokenizer",
    symbols=("megatron.training.global_vars.build_tokenizer",),
    reason=(
        "any tokenizer has Megatron import all libraries of tokenizers that are installed; "
        "transformers alone takes more than half as long as all of megatron-core, and lists the "
        "folders of hundreds of models: on every rank, for three numbers"
    ),
    written_for="megatron-core 0.19.2, transformers 5.24",
    remove_when="`build_tokenizer` imports the library that it was asked for, and that is light",
)

_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Those that are tokenizer.json, and nothing else."""

_OF_MEGATRON = (
    *("vocab_file", "merge_file", "metadata_path", "special_tokens"),
    *("trust_remote_code", "tokenizer_hf_no_use_fast"),
)
"""Arguments that make another tokenizer of the same files."""


@dataclass(frozen=True)
class TokenizerNumbers:
    """What training asks a tokenizer for, by the names of Megatron's.

    Attributes:
        path: of its folder.
        vocab_size: entries, with the added ones.
        eod: id of what ends a document, or None.
        pad: id of padding, or None.
    """

    path: str
    vocab_size: int
    eod: int | None
    pad: int | None

    @property
    def eos(self) -> int | None:
        """As `eod`."""
        return self.eod

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """What Megatron's caches of mock data are named after."""
        return {"class": type(self).__qualname__, "tokenizer_path": self.path}


def numbers_of(folder: Path) -> TokenizerNumbers | None:
    """Read a tokenizer's numbers; None where transformers might make something else of its files.

    That is one of a class with code of its own, one with tokens that its tokenizer.json does not
    have, and one that is damaged.
    """
    from tokenizers import Tokenizer

    try:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        if config.get("tokenizer_class") not in _CLASSES or (folder / "added_tokens.json").exists():
            return None
        model = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # tokenizers raises the base class; Megatron's way ends with an error
        return None
    named = {key: _text(value) for key, value in config.items() if key.endswith("_token")}
    names_file = folder / "special_tokens_map.json"
    if names_file.exists():
        for key, value in json.loads(names_file.read_text()).items():
            if not key.endswith("_token") or named.setdefault(key, _text(value)) != _text(value):
                return None
    added = [entry["content"] for entry in config.get("added_tokens_decoder", {}).values()]
    more = [_text(token) for token in config.get("extra_special_tokens", ())]
    ids = {
        token: model.token_to_id(token)
        for token in (*named.values(), *added, *more)
        if token is not None
    }
    if None in ids.values():
        return None
    # Where one of the two is missing, Megatron takes the other.
    end = named.get("eos_token") or named.get("sep_token")
    return TokenizerNumbers(
        path=str(folder),
        vocab_size=model.get_vocab_size(with_added_tokens=True),
        eod=None if end is None else ids[end],
        pad=None if named.get("pad_token") is None else ids[named["pad_token"]],
    )


def _text(token: Any) -> str | None:
    text: str | None = token["content"] if isinstance(token, dict) else token
    return text


def install() -> None:
    """Have Megatron's set-up read the numbers, where they are all there is to read."""
    from megatron.training import global_vars

    global_vars.build_tokenizer = _reading_numbers(global_vars.build_tokenizer)


def _reading_numbers(build_tokenizer: Callable[[Namespace], Any]) -> Callable[[Namespace], Any]:
    @functools.wraps(build_tokenizer)
    def build(args: Namespace) -> Any:
        plain = args.tokenizer_type == "HuggingFaceTokenizer" and not any(
            getattr(args, name) for name in _OF_MEGATRON
        )
        numbers = numbers_of(Path(args.tokenizer_model)) if plain else None
        return build_tokenizer(args) if numbers is None else numbers

    return build
