"""Documents to Megatron indexed datasets: `<output>_train.{bin,idx}`, `<output>_valid.{bin,idx}`.

A manifest, `<output>.json`, says what is in them and what they were made from. A run that was
killed is gone on with by the same request; a shard of a request is a directory for `merge`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_trinity.data import manifest, work
from megatron_trinity.data.chunks import Place, chunks_of
from megatron_trinity.data.documents import (
    DEFAULT_VALID_FRACTION,
    STANDARD_INPUT,
    SkipReport,
    Split,
)
from megatron_trinity.data.encode import Encoding, encode_in_order
from megatron_trinity.data.formats import Kind
from megatron_trinity.data.indexed import check_indexed_dataset
from megatron_trinity.data.listing import (
    SourceFile,
    Survey,
    expand_lists,
    refuse_output_inside_sources,
    source_files,
    survey,
)
from megatron_trinity.data.manifest import sha256_of_file
from megatron_trinity.data.shards import Shard, publish_shard, read_shard
from megatron_trinity.data.token_files import (
    SplitWriter,
    dataset_files,
    describe_split,
    publish_datasets,
    refuse_empty,
    write_index,
)
from megatron_trinity.data.token_model import TokenizerInfo, load_tokenizer
from megatron_trinity.errors import TrinityError, UsageError
from megatron_trinity.progress import Progress, SilentProgress

SECONDS_BETWEEN_JOURNALS = 15.0


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
    format: Kind | None = None  # of all files; None: what their names say
    shard: Shard | None = None

    @property
    def manifest_path(self) -> Path:
        return Path(f"{self.output}.json")

    @property
    def splits(self) -> tuple[Split, ...]:
        return ("train", "valid") if self.valid_fraction > 0 else ("train",)

    def prefix(self, split: Split) -> Path:
        return Path(f"{self.output}_{split}")

    @property
    def target(self) -> Path:
        """What is made: a shard's directory, or the output, by which its work is named."""
        return self.shard.directory(self.output) if self.shard else self.output

    @property
    def resumable(self) -> bool:
        return STANDARD_INPUT not in self.sources


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
    listed = SkipReport()
    surveyed = survey(_files(request, listed))
    if request.shard and surveyed.files < request.shard.count:
        raise UsageError(
            f"--shard {request.shard}: a file is not divided, and there are {surveyed.files}: "
            "choose as many shards at most, or split the files"
        )
    tokenizer = load_tokenizer(request.tokenizer)
    if request.append_eod and tokenizer.eod_id is None:
        raise UsageError(
            f"the tokenizer in {request.tokenizer} names no eos_token to end documents with: add "
            "one to its tokenizer_config.json, or pass --no-append-eod"
        )
    asked = _request_as_dict(request, tokenizer, surveyed.fingerprint)
    if not request.overwrite:
        present = _present(request, asked)
        if present is not None:
            work.remove_work(request.target)
            return present, False
        files = [*dataset_files(request.output).values(), request.manifest_path]
        taken = [request.target] if request.shard else files
        manifest.refuse_existing(taken, "was not made by this same request")
    try:
        with work.work_directory(request.target, asked, request.resumable) as staging:
            made = _make(request, asked, tokenizer, surveyed, listed, staging, show)
            if request.shard:
                publish_shard(staging, request.target, made)
                return made, True
            for split in request.splits:
                check_indexed_dataset(staging / split)
            publish_datasets(staging, request.output, made)
    except OSError as error:
        raise TrinityError(f"cannot write {request.output}: {error.strerror or error}") from error
    return made, True


def _files(request: PrepareRequest, report: SkipReport) -> Iterator[SourceFile]:
    return source_files(expand_lists(request.sources), request.glob, report, request.format)


def _files_of_shard(
    request: PrepareRequest, surveyed: Survey, report: SkipReport
) -> Iterator[SourceFile]:
    """The shard's files: neighbours, so that shards one behind the other are the whole."""
    files = _files(request, report)
    if request.shard is None:
        return files
    return request.shard.of(files, surveyed)


def _validate(request: PrepareRequest) -> None:
    if not 0.0 <= request.valid_fraction < 1.0:
        raise UsageError(f"--valid-fraction {request.valid_fraction} is not in [0, 1)")
    if request.workers < 1:
        raise UsageError(f"--workers {request.workers}: at least one is needed")
    if request.shard and not request.resumable:
        raise UsageError("--shard: standard input cannot be divided; give files")
    refuse_output_inside_sources(request.output, expand_lists(request.sources))


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
        **({"format": request.format.value} if request.format else {}),
    }


def _present(request: PrepareRequest, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of this very request, where its result is whole."""
    if not request.resumable:
        return None
    if request.shard:
        there = read_shard(request.target) if request.target.is_dir() else None
        return there if there is not None and there["request"] == asked else None
    present = manifest.read_manifest(request.manifest_path)
    if present is None or present.get("request") != asked:
        return None
    for split in request.splits:
        info = check_indexed_dataset(request.prefix(split))
        said = present.get("splits", {}).get(split, {})
        if (info.documents, info.tokens) != (said.get("documents"), said.get("tokens")):
            raise TrinityError(
                f"{request.prefix(split)} holds {info.documents} documents and {info.tokens} "
                f"tokens, not what {request.manifest_path} says: pass --overwrite"
            )
    return present


def _make(
    request: PrepareRequest,
    asked: dict[str, Any],
    tokenizer: TokenizerInfo,
    surveyed: Survey,
    listed: SkipReport,
    staging: Path,
    show: Callable[[int | None], Progress],
) -> dict[str, Any]:
    """Write `<split>.bin`, lengths and index into `staging`; return the manifest."""
    report = _write(request, tokenizer, surveyed, staging, show)
    splits: dict[str, dict[str, Any]] = {}
    journal = work.read_journal(staging)
    assert journal is not None
    for split in request.splits:
        digest = sha256_of_file(staging / f"{split}.bin")
        splits[split] = describe_split(journal.written[split], journal.counts[split], digest)
        if request.shard:
            splits[split]["lengths_sha256"] = sha256_of_file(staging / f"{split}.lengths")
    whole = SkipReport()
    if request.shard is None or request.shard.number == 1:
        whole.extend(listed)  # of all sources: one shard says it
    whole.extend(report)
    if not request.shard:
        _refuse_empty(request, splits, whole, staging)
        for split in request.splits:
            dtype = tokenizer.dtype
            write_index(staging / f"{split}.lengths", staging / f"{split}.idx", dtype)
    return {
        "format": 1,
        "request": asked,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id},
        "splits": splits,
        "skipped": whole.as_dict(),
    }


def _refuse_empty(
    request: PrepareRequest, splits: dict[str, dict[str, Any]], report: SkipReport, staging: Path
) -> None:
    try:
        refuse_empty(splits, request.sources, request.valid_fraction, report)
    except TrinityError:
        work.forget_journal(staging)  # going on would only say so again
        raise


def _write(
    request: PrepareRequest,
    tokenizer: TokenizerInfo,
    surveyed: Survey,
    staging: Path,
    show: Callable[[int | None], Progress],
) -> SkipReport:
    """Write ids and lengths, from the last journal on, and the journal of the end."""
    journal = work.read_journal(staging)
    report = journal.report if journal else SkipReport()
    done = journal.source_bytes if journal else 0
    place = journal.place if journal else Place()
    # Walked over once more: what the listing leaves out is known, whatever the place.
    files = _files_of_shard(request, surveyed, SkipReport())
    encoding = Encoding(tokenizer, request.json_key, request.valid_fraction, request.append_eod)
    encoded = encode_in_order(chunks_of(files, request.json_key, place), encoding, request.workers)
    total = surveyed.bytes if surveyed.bytes_known and not request.shard else None
    # Closed here and not by the collector: closing stops the workers.
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(show(total))
        writers: dict[Split, SplitWriter] = {}
        for split in request.splits:
            writers[split] = SplitWriter(
                staging / split,
                tokenizer.vocab_size,
                journal.written[split] if journal else None,
                journal.counts[split] if journal else None,
            )
            stack.callback(writers[split].close)
        stack.callback(encoded.close)
        journaled = time.monotonic()
        for result in encoded:
            for split, found in result.splits.items():
                writers[split].add(found)
            report.extend(result.report)
            done += result.source_bytes
            place = result.after
            count = sum(writer.written.documents for writer in writers.values())
            tokens = sum(writer.written.tokens for writer in writers.values())
            progress.update(done, f"{count:,} documents, {tokens:,} tokens")
            if request.resumable and time.monotonic() - journaled > SECONDS_BETWEEN_JOURNALS:
                work.write_journal(staging, place, done, writers, report)
                journaled = time.monotonic()
        work.write_journal(staging, place, done, writers, report)
    return report
