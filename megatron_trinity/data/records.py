"""What a chunk holds: its documents, and what of it is left out and why."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator

from megatron_trinity.data.chunks import Chunk, chunks_of
from megatron_trinity.data.documents import MAX_DOCUMENT_BYTES, Document, Skip, SkipReport
from megatron_trinity.data.formats import CODE_SUFFIXES, UTF16_MARKS, foreign_content, suffix_of
from megatron_trinity.data.listing import SourceFile
from megatron_trinity.data.opened import UNREADABLE, read_at_most, reason


def iterate_documents(
    files: Iterable[SourceFile], json_key: str, report: SkipReport
) -> Iterator[Document]:
    """Yield the documents of `files` in order; what cannot be used goes to `report`.

    Lines and rows have their text under `json_key`; all other files are one document each. Text is
    UTF-8, taken exactly as it is.
    """
    for chunk in chunks_of(files, json_key):
        report.extend(chunk.report)
        yield from documents_of(chunk, json_key, report)


def documents_of(chunk: Chunk, json_key: str, report: SkipReport) -> Iterator[Document]:
    """Yield the documents of `chunk` in order; what cannot be used goes to `report`."""
    for file in chunk.files:
        document = _text_file(file, report)
        if document is not None:
            yield document
    if chunk.lines:
        # Not splitlines, which takes a lone carriage return for an end.
        lines = chunk.lines.removesuffix(b"\n").split(b"\n")
        for number, line in enumerate(lines, chunk.first):
            document = _json_line(line, f"{chunk.label}:{number}", json_key, report)
            if document is not None:
                yield document
    for number, text in enumerate(chunk.rows or (), chunk.first):
        name = f"{chunk.label}:{number}"
        if text is None:
            report.add(Skip.NO_VALUE, name)
        else:
            document = _record(name, text, report)
            if document is not None:
                yield document


def _text_file(file: SourceFile, report: SkipReport) -> Document | None:
    try:
        raw = read_at_most(file, MAX_DOCUMENT_BYTES + 1)
    except UNREADABLE as error:
        report.add(Skip.UNREADABLE, f"{file.label} ({reason(error)})")
        return None
    if len(raw) > MAX_DOCUMENT_BYTES:
        report.add(Skip.TOO_LARGE, file.label)
        return None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        _report_content(raw, file.label, report)
        return None
    return _checked(Document(file.label, file.name, text, len(raw), _is_code(file.name)), report)


def _report_content(raw: bytes, label: str, report: SkipReport) -> None:
    """Say what bytes are that are no UTF-8."""
    if raw.startswith(UTF16_MARKS):
        report.add(Skip.UTF16, label)
    elif what := foreign_content(raw):
        report.add(Skip.OTHER_FORMAT, f"{label} ({what})")
    else:
        report.add(Skip.NOT_TEXT, label)


def _is_code(name: str) -> bool:
    return suffix_of(name) in CODE_SUFFIXES


def _json_line(line: bytes, name: str, json_key: str, report: SkipReport) -> Document | None:
    if not line.strip():
        report.add(Skip.EMPTY, name)
        return None
    if len(line) > MAX_DOCUMENT_BYTES:
        report.add(Skip.TOO_LARGE, name)
        return None
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        report.add(Skip.NOT_TEXT, name)
        return None
    except (ValueError, RecursionError):
        report.add(Skip.BAD_JSON, name)
        return None
    text = record.get(json_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        report.add(Skip.NO_TEXT_KEY, name)
        return None
    return _record(name, text, report)


def _record(name: str, text: str, report: SkipReport) -> Document | None:
    try:
        raw = text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; UTF-8 cannot
        report.add(Skip.NOT_TEXT, name)
        return None
    if len(raw) > MAX_DOCUMENT_BYTES:
        report.add(Skip.TOO_LARGE, name)
        return None
    key = hashlib.blake2b(raw, digest_size=16).hexdigest()
    return _checked(Document(name, key, text, len(raw)), report)


def _checked(document: Document, report: SkipReport) -> Document | None:
    if not document.text or document.text.isspace():
        report.add(Skip.EMPTY, document.name)
        return None
    if "\0" in document.text:
        report.add(Skip.NOT_TEXT, document.name)
        return None
    return document
