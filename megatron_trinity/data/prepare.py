"""Documents to Megatron indexed datasets: `<output>_train.{bin,idx}`, `<output>_valid.{bin,idx}`.

A manifest, `<output>.json`, says what is in them and what they were made from.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_trinity.data import documents, manifest
from megatron_trinity.data.documents import (
    DEFAULT_VALID_FRACTION,
    Document,
    Skip,
    SkipReport,
    Split,
)
from megatron_trinity.data.encode import (
    TokenizerInfo,
    encode_in_order,
    interrupts_deferred,
    load_tokenizer,
    token_dtype,
)
from megatron_trinity.data.indexed import check_indexed_dataset, unigram_entropy
from megatron_trinity.errors import TrinityError, UsageError
from megatron_trinity.progress import Progress, SilentProgress

MAX_DOCUMENT_TOKENS = 2**31 - 1  # Megatron's index has a sequence's length as int32


@dataclass(frozen=True)
class PrepareRequest:
    """What to prepare. `output` is a prefix: `<output>_train.bin`, `<output>.json` and so on."""

    sources: tuple[str, ...]
    tokenizer: Path
    output: Path
    glob: str = "**/*"
    json_key: str = "text"
    valid_fraction: float = DEFAULT_VALID_FRACTION
    append_eod: bool = True
    workers: int = 1
    overwrite: bool = False

    @property
    def manifest_path(self) -> Path:
        return Path(f"{self.output}.json")

    @property
    def splits(self) -> tuple[Split, ...]:
        return ("train", "valid") if self.valid_fraction > 0 else ("train",)

    def prefix(self, split: Split) -> Path:
        return Path(f"{self.output}_{split}")


@dataclass
class SplitWriter:
    """One split's dataset being written, and what is known of it so far."""

    prefix: Path
    vocab_size: int
    builder: Any = field(init=False)
    counts: NDArray[np.int64] = field(init=False)
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def __post_init__(self) -> None:
        builder_class = _import_megatron_builder()
        self.builder = builder_class(f"{self.prefix}.bin", dtype=token_dtype(self.vocab_size).type)
        self.counts = np.zeros(self.vocab_size, dtype=np.int64)

    def add(self, document: Document, ids: NDArray[np.integer]) -> None:
        self.builder.add_document(ids, [len(ids)])
        np.add.at(self.counts, ids, 1)
        self.documents += 1
        self.tokens += len(ids)
        self.text_bytes += document.text_bytes

    def close(self) -> None:
        self.builder.data_file.close()

    def finish(self) -> dict[str, Any]:
        """Write the index, check both files as training will, and describe them."""
        self.builder.finalize(f"{self.prefix}.idx")
        info = check_indexed_dataset(self.prefix)
        if (info.documents, info.tokens) != (self.documents, self.tokens):
            raise TrinityError(f"{self.prefix} was not written whole: is the disk full?")
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.text_bytes,
            "dtype": info.dtype.name,
            "max_token_id": int(np.flatnonzero(self.counts)[-1]),
            "unigram_entropy_nats": unigram_entropy(self.counts),
        }


def _import_megatron_builder() -> Any:
    with interrupts_deferred(), warnings.catch_warnings():
        # On import Megatron warns of GPU packages that are not there; none matters here.
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    return IndexedDatasetBuilder


def prepare_dataset(
    request: PrepareRequest, show: Callable[[int | None], Progress] = SilentProgress
) -> tuple[dict[str, Any], bool]:
    """Prepare the datasets of `request`; return the manifest and whether anything was done.

    Nothing is done where the manifest says that the same request was carried out on the same
    sources and the datasets are whole.

    Args:
        show: makes the progress display, given the bytes in all (None if unknown).

    Raises:
        UsageError: a source or the tokenizer is missing, a number is out of range.
        TrinityError: a split has no documents, or an output exists that is not this request's.
    """
    _validate(request)
    report = SkipReport()
    files = documents.list_source_files(request.sources, request.glob, report)
    tokenizer = load_tokenizer(request.tokenizer)
    if request.append_eod and tokenizer.eod_id is None:
        raise UsageError(
            f"the tokenizer in {request.tokenizer} names no eos_token to end documents with: add "
            "one to its tokenizer_config.json, or pass --no-append-eod"
        )
    asked = _request_as_dict(request, tokenizer, documents.fingerprint(files))

    outputs = [
        Path(f"{request.prefix(split)}{suffix}")
        for split in ("train", "valid")
        for suffix in (".bin", ".idx")
    ]
    if not request.overwrite:
        present = manifest.read_manifest(request.manifest_path)
        if present is not None and present.get("request") == asked:
            _check_against(present, request)
            return present, False
        manifest.refuse_existing(
            [*outputs, request.manifest_path], "was not made by this same request"
        )

    _import_megatron_builder()  # takes seconds: before the progress display starts its clock
    known_size = not any(documents.is_compressed(file) for file in files)
    progress = show(sum(file.size for file in files) if known_size else None)
    parent = request.output.parent
    try:
        with manifest.staging_directory(parent, request.output.name) as staging, progress:
            splits = _write_splits(request, tokenizer, files, report, staging, progress)
            made = {
                "format": 1,
                "request": asked,
                "tokenizer": {"vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id},
                "splits": splits,
                "skipped": report.as_dict(),
            }
            staged = {
                staging / path.name: path for path in outputs if (staging / path.name).exists()
            }
            stale = set(outputs) - set(staged.values())
            manifest.publish(staged, made, request.manifest_path, staging, stale)
    except OSError as error:
        raise TrinityError(f"cannot write {request.output}: {error.strerror or error}") from error
    return made, True


def _refuse_empty(
    request: PrepareRequest, writers: dict[Split, SplitWriter], report: SkipReport
) -> None:
    total = sum(writer.documents for writer in writers.values())
    if total == 0:
        left_out = "".join(f"; {line}" for line in report.summary(shown=1))
        raise TrinityError(f"no documents in {', '.join(request.sources)}{left_out}")
    for split, writer in writers.items():
        if writer.documents == 0:
            raise TrinityError(
                f"of {total} documents none fell to {split} with --valid-fraction "
                f"{request.valid_fraction}: choose another fraction (0: no validation), or give "
                "more documents"
            )


def _validate(request: PrepareRequest) -> None:
    if not 0.0 <= request.valid_fraction < 1.0:
        raise UsageError(f"--valid-fraction {request.valid_fraction} is not in [0, 1)")
    if request.workers < 1:
        raise UsageError(f"--workers {request.workers}: at least one is needed")
    documents.refuse_output_inside_sources(request.output, request.sources)


def _request_as_dict(
    request: PrepareRequest, tokenizer: TokenizerInfo, fingerprint: str
) -> dict[str, Any]:
    """All that the result depends on, and nothing else: the workers are not in it."""
    return {
        "sources": list(request.sources),
        "glob": request.glob,
        "json_key": request.json_key,
        "valid_fraction": request.valid_fraction,
        "append_eod": request.append_eod,
        "eod_token": tokenizer.eod_token,
        "tokenizer_sha256": tokenizer.sha256,
        "fingerprint": fingerprint,
    }


def _check_against(present: dict[str, Any], request: PrepareRequest) -> None:
    for split in request.splits:
        info = check_indexed_dataset(request.prefix(split))
        said = present.get("splits", {}).get(split, {})
        if (info.documents, info.tokens) != (said.get("documents"), said.get("tokens")):
            raise TrinityError(
                f"{request.prefix(split)} holds {info.documents} documents and {info.tokens} "
                f"tokens, not what {request.manifest_path} says: pass --overwrite"
            )


def _write_splits(
    request: PrepareRequest,
    tokenizer: TokenizerInfo,
    files: list[documents.SourceFile],
    report: SkipReport,
    staging: Path,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    writers = {
        split: SplitWriter(staging / request.prefix(split).name, tokenizer.vocab_size)
        for split in request.splits
    }
    found = documents.iterate_documents(files, request.json_key, report)
    encoded = encode_in_order(found, tokenizer, request.append_eod, request.workers)
    source_bytes = 0
    # Closed here and not by the collector: closing stops the workers.
    with contextlib.ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.close)
        stack.callback(encoded.close)
        for document, ids in encoded:
            source_bytes += document.source_bytes
            if len(ids) == 0:
                report.add(Skip.NO_TOKENS, document.name)
            elif len(ids) > MAX_DOCUMENT_TOKENS:
                report.add(Skip.TOO_LONG, document.name)
            else:
                split = documents.assign_split(document.split_key, request.valid_fraction)
                writers[split].add(document, ids)
            documents_done = sum(writer.documents for writer in writers.values())
            tokens = sum(writer.tokens for writer in writers.values())
            progress.update(source_bytes, f"{documents_done:,} documents, {tokens:,} tokens")
    _refuse_empty(request, writers, report)
    return {split: writer.finish() for split, writer in writers.items()}
