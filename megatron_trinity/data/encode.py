"""Chunks of documents to token ids in several processes, in order.

This module stays light to import (no torch, no Megatron): each worker process imports it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from megatron_trinity.data.chunks import Chunk, Place
from megatron_trinity.data.documents import Document, Skip, SkipReport, Split, assign_split
from megatron_trinity.data.interrupts import end_with_parent, interrupts_blocked
from megatron_trinity.data.records import documents_of
from megatron_trinity.data.token_model import Encoder, Ids, TokenizerInfo, token_dtype
from megatron_trinity.errors import TrinityError

MAX_DOCUMENT_TOKENS = 2**31 - 1  # Megatron's index has a sequence's length as int32

_CHARACTERS_OF_A_CALL = 1 << 20  # what is kept of each character until then is up to 350 bytes
_CHUNKS_AHEAD = 4  # per worker: enough to keep them busy, little enough to bound the memory
_BYTES_AHEAD = 1 << 27  # of all chunks that wait: some hold one long document


@dataclass(frozen=True)
class Encoding:
    """How documents become ids: the same for every chunk."""

    tokenizer: TokenizerInfo
    json_key: str
    valid_fraction: float
    append_eod: bool


@dataclass(slots=True)
class Encoded:
    """Documents of one split, one behind the other."""

    ids: Ids
    lengths: NDArray[np.int32]
    text_bytes: int


@dataclass(slots=True)
class Result:
    """What became of a chunk, and where the next one begins."""

    splits: dict[Split, Encoded]
    report: SkipReport
    after: Place = field(default_factory=Place)
    source_bytes: int = 0


class ChunkEncoder:
    """Chunks to ids, with what stays the same from one to the next."""

    def __init__(self, encoding: Encoding) -> None:
        tokenizer = encoding.tokenizer
        self._how = encoding
        self._dtype = token_dtype(tokenizer.vocab_size)
        eod_id = tokenizer.eod_id if encoding.append_eod else None
        self._encoder = Encoder(tokenizer.serialized, eod_id, self._dtype)

    def encode(self, chunk: Chunk) -> Result:
        report = SkipReport()
        report.extend(chunk.report)
        ids: dict[Split, list[Ids]] = {}
        text_bytes: dict[Split, int] = {}
        for document, found in self._encoded(documents_of(chunk, self._how.json_key, report)):
            if found is None:
                report.add(Skip.TOO_LARGE, document.name)
            elif len(found) == 0:
                report.add(Skip.NO_TOKENS, document.name)
            elif len(found) > MAX_DOCUMENT_TOKENS:
                report.add(Skip.TOO_LONG, document.name)
            else:
                split = assign_split(document.split_key, self._how.valid_fraction)
                ids.setdefault(split, []).append(found)
                text_bytes[split] = text_bytes.get(split, 0) + document.text_bytes
        splits = {
            split: Encoded(
                np.concatenate(parts),
                np.array([len(part) for part in parts], dtype=np.int32),
                text_bytes[split],
            )
            for split, parts in ids.items()
        }
        return Result(splits, report)

    def _encoded(self, found: Iterable[Document]) -> Iterator[tuple[Document, Ids | None]]:
        batch: list[Document] = []
        characters = 0
        for document in found:
            if characters + len(document.text) > _CHARACTERS_OF_A_CALL:
                yield from self._together(batch)
                batch, characters = [], 0
            batch.append(document)
            characters += len(document.text)
        yield from self._together(batch)

    def _together(self, batch: list[Document]) -> Iterator[tuple[Document, Ids | None]]:
        texts = [document.text for document in batch]
        return zip(batch, self._encoder.encode(texts) if texts else [], strict=True)


_worker_encoder: ChunkEncoder | None = None


def _start_worker(encoding: Encoding) -> None:
    global _worker_encoder
    end_with_parent()
    _worker_encoder = ChunkEncoder(encoding)


def _encode_in_worker(chunk: Chunk) -> Result:
    assert _worker_encoder is not None
    return _worker_encoder.encode(chunk)


def available_cpus() -> int:
    """The processors that this process may use: a batch system often grants it a part only."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def encode_in_order(chunks: Iterable[Chunk], encoding: Encoding, workers: int) -> Generator[Result]:
    """Yield what becomes of each chunk, in order, whatever the number of workers.

    Raises:
        TrinityError: a worker process was killed.
    """
    if workers == 1:
        encoder = ChunkEncoder(encoding)
        for chunk in chunks:
            yield _placed(encoder.encode(chunk), chunk.after, chunk.source_bytes)
        return

    # A fresh interpreter for each: forking a process whose libraries have threads can hang.
    executor = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (encoding,))
    waiting: deque[tuple[Place, int, int, Future[Result]]] = deque()
    ahead = 0
    try:
        for chunk in chunks:
            while waiting and (
                len(waiting) >= workers * _CHUNKS_AHEAD or ahead + chunk.size > _BYTES_AHEAD
            ):
                after, source_bytes, size, future = waiting.popleft()
                ahead -= size
                yield _placed(future.result(), after, source_bytes)
            with interrupts_blocked():
                future = executor.submit(_encode_in_worker, chunk)
            ahead += chunk.size
            waiting.append((chunk.after, chunk.source_bytes, chunk.size, future))
        while waiting:
            after, source_bytes, _, future = waiting.popleft()
            yield _placed(future.result(), after, source_bytes)
    except BrokenProcessPool as error:
        raise TrinityError(
            "a tokenising process was killed, most likely for want of memory: use fewer --workers"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _placed(result: Result, after: Place, source_bytes: int) -> Result:
    result.after, result.source_bytes = after, source_bytes
    return result
