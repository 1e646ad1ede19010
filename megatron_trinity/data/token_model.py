"""The tokenizers that data is prepared with: Hugging Face's and SentencePiece models.

This module stays light to import (no torch, no Megatron): each worker process imports it.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_trinity.data.interrupts import (
    end_with_parent,
    interrupts_blocked,
    interrupts_deferred,
)
from megatron_trinity.data.manifest import sha256_of_file
from megatron_trinity.errors import TrinityError, UsageError

PIECE = 1 << 20
"""Characters of a longer text that are encoded together: each takes up to 350 bytes of memory."""

_LONGEST_PIECE = 2 * PIECE
_WORDS_KEPT = 100_000
_CONTEXT = (
    2048  # characters on each side of a cut that are encoded to see that it is none to tokens
)

Ids = NDArray[np.integer]


@dataclass(frozen=True)
class TokenizerInfo:
    """A tokenizer as training loads it: `--tokenizer-type HuggingFaceTokenizer` or SentencePiece's.

    Attributes:
        serialized: the text of a tokenizer.json, or the bytes of a SentencePiece model.
        sha256: of the tokenizer's file.
    """

    serialized: str | bytes
    vocab_size: int
    eod_token: str | None
    eod_id: int | None
    sha256: str

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """Of the ids in a dataset."""
        return token_dtype(self.vocab_size)


def load_tokenizer(named: Path) -> TokenizerInfo:
    """Load a directory with a tokenizer.json, that file, a SentencePiece .model, or OWNER/NAME of
    the Hub's cache.

    A Hugging Face tokenizer goes through AutoTokenizer, as in training and inference.

    Raises:
        UsageError: there is none.
        TrinityError: it does not load, or its ids do not fit its size.
    """
    if named.is_file() and named.suffix == ".model":
        return _load_sentencepiece(named)
    directory = named.parent if named.is_file() and named.name == "tokenizer.json" else named
    if not directory.exists() and len(named.parts) == 2 and not named.is_absolute():
        directory = _cached_on_hub(named)
    path = directory / "tokenizer.json"
    if not path.is_file():
        if (directory / "tokenizer.model").is_file():
            return _load_sentencepiece(directory / "tokenizer.model")
        raise UsageError(
            f"no tokenizer.json in {directory}: give a tokenizer's directory, or make one with "
            "tools/train_tokenizer.py"
        )
    if "transformers" in sys.modules:
        return _load_hugging_face(directory, path)
    # It imports torch, half a gigabyte that this process has no use for: a process of its own.
    with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as executor:
        with interrupts_blocked():
            loaded = executor.submit(_load_hugging_face, directory, path)
        return loaded.result()


def _cached_on_hub(named: Path) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(named), local_files_only=True, allow_patterns=["tokenizer*"])
        )
    except Exception as error:  # of several classes, among them one for a name that cannot be
        raise UsageError(
            f"{named} is no directory, and the Hub's cache has no such model: give a tokenizer's "
            f"directory, or take it with hf download {named} --include 'tokenizer*'"
        ) from error


def _load_hugging_face(directory: Path, path: Path) -> TokenizerInfo:
    with interrupts_deferred():
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        serialized = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # whatever a damaged file makes the libraries raise
        detail = " ".join(str(error).split())[:200]
        raise TrinityError(f"the tokenizer in {directory} does not load: {detail}") from error
    vocab_size = len(tokenizer)
    if max(tokenizer.get_vocab().values()) >= vocab_size:
        raise TrinityError(
            f"the tokenizer in {directory} has {vocab_size} tokens but ids beyond that: a model of "
            "its size could not hold them"
        )
    return TokenizerInfo(
        serialized=serialized,
        vocab_size=vocab_size,
        eod_token=tokenizer.eos_token,
        eod_id=tokenizer.eos_token_id,
        sha256=sha256_of_file(path),
    )


def _load_sentencepiece(path: Path) -> TokenizerInfo:
    import sentencepiece

    content = path.read_bytes()
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        size, eod = model.vocab_size(), model.eos_id()
    except Exception as error:
        raise TrinityError(f"{path} is no SentencePiece model that loads") from error
    known = eod >= 0
    return TokenizerInfo(
        serialized=content,
        vocab_size=size,
        eod_token=model.id_to_piece(eod) if known else None,
        eod_id=eod if known else None,
        sha256=sha256_of_file(path),
    )


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """The dtype of the .bin: equal to Megatron's `DType.optimal_dtype`, which a test asserts."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


class Encoder:
    """Texts to token ids, each for itself.

    The name of a special token inside a document is text like any other: were it to become the
    token, a document could end itself.
    """

    def __init__(
        self, serialized: str | bytes, eod_id: int | None, dtype: np.dtype[np.integer]
    ) -> None:
        # Processes fill the cores; threads beside them would only wait for one another.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._tail = [] if eod_id is None else [eod_id]
        self._dtype = dtype
        self._model: Any
        if isinstance(serialized, bytes):
            import sentencepiece

            self._model = sentencepiece.SentencePieceProcessor(model_proto=serialized)
            return
        from tokenizers import Tokenizer

        self._model = Tokenizer.from_str(serialized)
        self._model.encode_special_tokens = True
        # It keeps the ids of words that it has met: of ten thousand, where nothing is said, which
        # takes an eighth more time. Not every kind of model keeps any.
        if hasattr(self._model.model, "_resize_cache"):
            self._model.model._resize_cache(_WORDS_KEPT)
        self._model.no_truncation()
        self._model.no_padding()

    def encode(self, texts: Sequence[str]) -> list[Ids | None]:
        """The ids of each text and of its end; nothing at all for a text without tokens.

        None where one is too long to be encoded at once and has no line's end to do so in parts.
        Several texts in a call are about a twentieth quicker than as many calls.
        """
        if len(texts) == 1 and len(texts[0]) > _LONGEST_PIECE:
            return [self._encode_in_pieces(texts[0])]
        if any(len(text) > _LONGEST_PIECE for text in texts):
            return [ids for text in texts for ids in self.encode([text])]
        return [self._ended(ids) for ids in self._ids(texts)]

    def _ended(self, ids: list[int]) -> Ids:
        if not ids:
            return np.array([], dtype=self._dtype)
        ids += self._tail
        # Quicker than from the list itself, which numpy looks through for its type.
        return np.frombuffer(array(self._dtype.char, ids), dtype=self._dtype)

    def _encode_in_pieces(self, text: str) -> Ids | None:
        parts: list[Ids] = []
        start = 0
        while start < len(text):
            end = self._end_of_piece(text, start)
            if end is None:
                return None
            parts.append(np.array(self._ids([text[start:end]])[0], dtype=self._dtype))
            start = end
        parts.append(np.array(self._tail, dtype=self._dtype))
        return np.concatenate(parts)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if hasattr(self._model, "encode_batch_fast"):
            encodings = self._model.encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        return [self._model.encode(text) for text in texts]

    def _end_of_piece(self, text: str, start: int) -> int | None:
        """Where the piece from `start` may end, so that pieces have the tokens of the whole.

        That is behind a line's end, before something other than white space, where the text around
        has the same tokens in one as in two parts: a pre-tokenizer that always cuts there.
        """
        if len(text) - start <= _LONGEST_PIECE:
            return len(text)
        cut = start + PIECE
        while (cut := text.find("\n", cut, start + _LONGEST_PIECE) + 1) > 0:
            if text[cut].isspace():
                continue
            before = text[max(start, cut - _CONTEXT) : cut]
            behind = text[cut : cut + _CONTEXT]
            whole, first, second = self._ids([before + behind, before, behind])
            if whole == first + second:
                return cut
        return None
