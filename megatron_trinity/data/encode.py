"""Text to token ids in several processes, in the order of the documents.

This module stays light to import (no torch, no Megatron): each worker process imports it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megatron_trinity.data.documents import Document
from megatron_trinity.data.manifest import sha256_of_file
from megatron_trinity.errors import TrinityError, UsageError

_BATCH_BYTES = 1 << 18
_BATCHES_AHEAD = 4  # per worker: enough to keep them busy, little enough to bound the memory

Encoded = list[NDArray[np.integer]]


@dataclass(frozen=True)
class TokenizerInfo:
    """A tokenizer as Megatron's `--tokenizer-type HuggingFaceTokenizer` would load it."""

    serialized: str
    vocab_size: int
    eod_token: str | None
    eod_id: int | None
    sha256: str


def load_tokenizer(directory: Path) -> TokenizerInfo:
    """Load the tokenizer in `directory` through AutoTokenizer, as training and inference do.

    Raises:
        UsageError: there is no tokenizer.json.
        TrinityError: it does not load, or its ids do not fit its size.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UsageError(
            f"no tokenizer.json in {directory}: give a tokenizer's directory, or make one with "
            "tools/train_tokenizer.py"
        )
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


def available_cpus() -> int:
    """The processors that this process may use: a batch system often grants it a part only."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """The dtype of the .bin: equal to Megatron's `DType.optimal_dtype`, which a test asserts."""
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


class Encoder:
    """Text to token ids, one document at a time.

    The name of a special token inside a document is text like any other: were it to become the
    token, a document could end itself.
    """

    def __init__(self, serialized: str, eod_id: int | None, dtype: np.dtype[np.integer]) -> None:
        self._tokenizer = Tokenizer.from_str(serialized)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tail = [] if eod_id is None else [eod_id]
        self._dtype = dtype

    def encode(self, texts: list[str]) -> Encoded:
        """Return the ids of each text and of its end; nothing at all for a text without tokens."""
        return [self._encode_one(text) for text in texts]

    def _encode_one(self, text: str) -> NDArray[np.integer]:
        ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return np.array(ids + self._tail if ids else [], dtype=self._dtype)


_worker_encoder: Encoder | None = None


def _start_worker(serialized: str, eod_id: int | None, dtype: np.dtype[np.integer]) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes already fill the cores
    _worker_encoder = Encoder(serialized, eod_id, dtype)


def _encode_in_worker(texts: list[str]) -> Encoded:
    assert _worker_encoder is not None
    return _worker_encoder.encode(texts)


def encode_in_order(
    found: Iterable[Document],
    tokenizer: TokenizerInfo,
    append_eod: bool,
    workers: int,
) -> Generator[tuple[Document, NDArray[np.integer]]]:
    """Yield each document with its ids, in order, whatever the number of workers.

    Raises:
        TrinityError: a worker process was killed.
    """
    setup = (
        tokenizer.serialized,
        tokenizer.eod_id if append_eod else None,
        token_dtype(tokenizer.vocab_size),
    )
    if workers == 1:
        encoder = Encoder(*setup)
        for document in found:
            yield document, encoder.encode([document.text])[0]
        return

    # A fresh interpreter for each: forking a process whose libraries have threads can hang.
    executor = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, setup)
    waiting: deque[tuple[list[Document], Future[Encoded]]] = deque()
    try:
        for batch in _batches(found):
            texts = [document.text for document in batch]
            with _interrupts_blocked():
                waiting.append((batch, executor.submit(_encode_in_worker, texts)))
            if len(waiting) > workers * _BATCHES_AHEAD:
                yield from _finished(waiting.popleft())
        while waiting:
            yield from _finished(waiting.popleft())
    except BrokenProcessPool as error:
        raise TrinityError(
            "a tokenising process was killed, most likely for want of memory: use fewer --workers"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _finished(
    item: tuple[list[Document], Future[Encoded]],
) -> Iterator[tuple[Document, NDArray[np.integer]]]:
    batch, future = item
    return zip(batch, future.result(), strict=True)


def _batches(found: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in found:
        batch.append(document)
        size += document.text_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Hold Ctrl-C back while processes may be started: they inherit this, and leave it to us."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Act on Ctrl-C only afterwards: some modules swallow any exception while they are imported."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        signal.raise_signal(signal.SIGINT)
