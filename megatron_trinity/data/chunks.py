"""Files cut into chunks of about a megabyte of whole documents, not looked into yet.

Cutting is cheap and happens in one process, in order; what a chunk holds is read by `records`, in
many. A `Place` says where the next chunk begins, so that reading can go on there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO

from megatron_trinity.data import columns
from megatron_trinity.data.documents import MAX_DOCUMENT_BYTES, Skip, SkipReport
from megatron_trinity.data.formats import Kind, foreign_content, suffix_of
from megatron_trinity.data.listing import SourceFile
from megatron_trinity.data.opened import UNREADABLE, open_bytes, reason
from megatron_trinity.errors import TrinityError

CHUNK_BYTES = 1 << 20
_FILES_OF_A_CHUNK = 256
_BLOCK = 1 << 18


@dataclass(frozen=True, slots=True)
class Place:
    """Behind `number` lines or rows of file number `file`, which end at byte `position`."""

    file: int = 0
    number: int = 0
    position: int = 0


@dataclass(slots=True)
class Chunk:
    """Some whole documents: files of text, lines, or the texts of rows.

    Attributes:
        first: number of the first line or row, from 1.
        lines: whole lines, as bytes.
        after: where the next chunk begins.
        source_bytes: of the files' sizes, for a progress bar; 0 where that is not known.
        report: what cutting has left out, before what is here.
    """

    after: Place
    label: str = ""
    first: int = 1
    files: list[SourceFile] = field(default_factory=list)
    lines: bytes = b""
    rows: list[str | None] | None = None
    source_bytes: int = 0
    report: SkipReport = field(default_factory=SkipReport)

    @property
    def size(self) -> int:
        """About how many bytes it keeps in memory here."""
        rows = sum(len(row) for row in self.rows or () if row is not None)
        return len(self.lines) + rows + 4096


def chunks_of(files: Iterable[SourceFile], key: str, start: Place | None = None) -> Iterator[Chunk]:
    """Cut `files` into chunks, from `start` on.

    Raises:
        TrinityError: a file of JSON lines, Parquet or Arrow holds something else, or has no column
            `key`.
    """
    start = start or Place()
    texts: list[SourceFile] = []
    number = -1
    for number, file in enumerate(files):
        if number < start.file:
            continue
        assert file.format is not None
        if file.format.kind == Kind.TEXT:
            texts.append(file)
            if len(texts) >= _FILES_OF_A_CHUNK or sum(f.size for f in texts) >= CHUNK_BYTES:
                yield _of_texts(texts, number + 1)
                texts = []
            continue
        if texts:
            yield _of_texts(texts, number)
            texts = []
        place = start if number == start.file else Place(number)
        if file.format.kind == Kind.JSON_LINES:
            yield from _of_lines(file, place)
        else:
            yield from _of_rows(file, place, key)
    if texts:
        yield _of_texts(texts, number + 1)


def _of_texts(files: list[SourceFile], following: int) -> Chunk:
    return Chunk(Place(following), files=files, source_bytes=sum(file.size for file in files))


def _of_rows(file: SourceFile, place: Place, key: str) -> Iterator[Chunk]:
    number = place.number
    try:
        for rows in columns.text_rows(file, key, number, CHUNK_BYTES):
            first, number = number + 1, number + len(rows)
            yield Chunk(Place(place.file, number), file.label, first, rows=rows)
    except columns.UnreadableError as error:
        yield _damaged(file, place.file, f"row {number}", str(error))
    else:
        yield Chunk(Place(place.file + 1), source_bytes=file.size)


def _damaged(file: SourceFile, index: int, where: str, why: str) -> Chunk:
    chunk = Chunk(Place(index + 1), source_bytes=file.size)
    chunk.report.add(Skip.UNREADABLE, f"{file.label} after {where} ({why})")
    return chunk


def _of_lines(file: SourceFile, place: Place) -> Iterator[Chunk]:
    cutter = _Cutter(file, place)
    stream = None
    try:
        stream = open_bytes(file)
        _go_to(stream, file, place)
        while block := stream.read1(_BLOCK):  # type: ignore[attr-defined]
            chunk = cutter.add(block)
            if chunk is not None:
                yield chunk
        yield from cutter.rest()
    except UNREADABLE as error:
        yield from cutter.rest(whole=False)
        yield _damaged(file, place.file, f"line {cutter.number}", reason(error))
    else:
        yield Chunk(Place(place.file + 1))
    finally:
        if stream is not None and file.label != "standard input":
            stream.close()


def _go_to(stream: IO[bytes], file: SourceFile, place: Place) -> None:
    """Pass what was read before: by its place, or by reading it again where it is compressed."""
    assert file.format is not None
    if place.position and file.format.compression is None:
        stream.seek(place.position)
        return
    left = place.position
    while left:
        block = stream.read1(min(left, _BLOCK))  # type: ignore[attr-defined]
        if not block:
            raise EOFError("it is shorter than it was")
        left -= len(block)


class _Cutter:
    """Blocks of bytes to chunks of whole lines."""

    def __init__(self, file: SourceFile, place: Place) -> None:
        self._file = file
        self._index = place.file
        self._position = place.position
        self.number = place.number
        self._parts: list[bytes] = []  # whole lines, then the beginning of one
        self._size = 0
        self._ends = False  # whether a line ends within the parts
        self._dropping = False
        self._report = SkipReport()

    def add(self, block: bytes) -> Chunk | None:
        if self._position == 0 and not self._parts:
            _refuse_other_content(self._file, block)
        if self._dropping:
            return self._drop(block)
        self._parts.append(block)
        self._size += len(block)
        self._ends = self._ends or b"\n" in block
        if not self._ends and self._size > MAX_DOCUMENT_BYTES:
            self._report.add(Skip.TOO_LARGE, f"{self._file.label}:{self.number + 1}")
            self._position += self._size
            self._parts, self._size, self._dropping = [], 0, True
            return None
        return self._take() if self._ends and self._size >= CHUNK_BYTES else None

    def rest(self, whole: bool = True) -> Iterator[Chunk]:
        """What is left at the file's end; without `whole` its last line was cut off by damage."""
        if self._ends:
            yield self._take()
        if self._dropping:
            self.number += 1
        elif self._parts and whole:
            yield self._chunk(b"".join(self._parts), 1)
        if self._report.total:
            yield self._chunk(b"", 0)

    def _drop(self, block: bytes) -> Chunk | None:
        end = block.find(b"\n") + 1
        self._position += end or len(block)
        if not end:
            return None
        self.number += 1
        self._dropping = False
        return self.add(block[end:]) if block[end:] else None

    def _take(self) -> Chunk:
        joined = b"".join(self._parts)
        end = joined.rindex(b"\n") + 1
        rest = joined[end:]
        self._parts, self._size, self._ends = [rest] if rest else [], len(rest), False
        lines = joined[:end]
        return self._chunk(lines, lines.count(b"\n"))

    def _chunk(self, lines: bytes, count: int) -> Chunk:
        first = self.number + 1
        if self._position == 0:
            _refuse_pretty_json(self._file, lines)
        self.number += count
        self._position += len(lines)
        report, self._report = self._report, SkipReport()
        after = Place(self._index, self.number, self._position)
        assert self._file.format is not None
        known = self._file.size and self._file.format.compression is None
        return Chunk(
            after, self._file.label, first, lines=lines, report=report,
            source_bytes=len(lines) if known else 0,
        )  # fmt: skip


def _refuse_other_content(file: SourceFile, head: bytes) -> None:
    what = foreign_content(head)
    if what is not None:
        raise TrinityError(f"{file.label} is to be JSON lines, and is {what}")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[") and _is_array(head):
        raise TrinityError(
            f"{file.label} is one JSON array, not an object a line: convert it with "
            f"jq -c '.[]' {file.label} > FILE.jsonl"
        )


def _is_array(head: bytes) -> bool:
    """Whether it holds objects or goes on behind its first line: a lone line is only a bad one."""
    first = head.lstrip().partition(b"\n")[0]
    return b"{" in head.lstrip()[1:64] or first.strip() == b"["


def _refuse_pretty_json(file: SourceFile, lines: bytes) -> None:
    """`.json` names one object over many lines as well as an object a line."""
    if ".json" not in (suffix_of(file.name), suffix_of(file.name.rpartition(".")[0])):
        return
    first = lines.lstrip().partition(b"\n")[0]
    try:
        is_object = isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        is_object = False
    if first and not is_object:
        raise TrinityError(
            f"{file.label} is not JSON lines, since its first line is no object: convert it with "
            f"jq -c . {file.label} > FILE.jsonl, or leave it out with --glob"
        )
