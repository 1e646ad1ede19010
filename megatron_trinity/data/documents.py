"""Documents from directories, text files and JSON lines; each one left out is counted and named.

A document has a `split_key`, on which alone depends whether it is trained on or validated on.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import json
import os
import stat
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import IO, Literal, cast

from megatron_trinity.errors import UsageError

Split = Literal["train", "valid"]

PYTHON_STDLIB = "python-stdlib"
"""The source name that stands for the running interpreter's own standard library."""

DEFAULT_VALID_FRACTION = 0.05
"""The share of documents for validation: the same default for the tokenizer and for the dataset."""

JSON_LINES_SUFFIXES = (".jsonl", ".jsonl.gz")

# Third-party packages differ from machine to machine. Tests are two thirds of the bytes, hold files
# that are broken on purpose, and are left out of the interpreter by some Linux distributions.
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


class Skip(StrEnum):
    """Why a document, or a file that might have held some, is left out."""

    UNREADABLE = "unreadable"
    EMPTY = "empty or only white space"
    NOT_TEXT = "not text (not UTF-8, or holds a NUL)"
    BAD_JSON = "malformed JSON line"
    NO_TEXT_KEY = "JSON line without a string under the text key"
    DUPLICATE = "the same file as another"
    LINKED_DIRECTORY = "symbolic link to a directory, not followed"
    NOT_A_FILE = "not a regular file"
    NO_TOKENS = "no tokens"
    TOO_LONG = "more than 2^31 - 1 tokens"


@dataclass
class SkipReport:
    """What was left out: names by reason, in the order met."""

    names: dict[Skip, list[str]] = field(default_factory=dict)

    def add(self, reason: Skip, name: str) -> None:
        self.names.setdefault(reason, []).append(name)

    @property
    def total(self) -> int:
        return sum(len(names) for names in self.names.values())

    def as_dict(self) -> dict[str, dict[str, object]]:
        """For a manifest: `{reason: {"count": n, "names": [...]}}`."""
        return {
            reason.value: {"count": len(names), "names": list(names)}
            for reason, names in sorted(self.names.items())
        }

    def summary(self, shown: int = 3) -> list[str]:
        """One line a reason for people, with the first `shown` names."""
        lines = []
        for reason, names in sorted(self.names.items()):
            more = f", and {len(names) - shown:,} more" if len(names) > shown else ""
            lines.append(f"{len(names):,} {reason.value}: {', '.join(names[:shown])}{more}")
        return lines


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that holds documents: one (text) or one a line (JSON lines)."""

    path: Path
    name: str  # relative to its source, with "/": the same on every machine
    label: str  # for people: the source as given, and the name
    size: int  # bytes
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Document:
    """One document.

    `split_key` is the file's relative name, or for a JSON line the digest of its text, since a line
    number would change when a line is inserted above it.
    """

    name: str
    split_key: str
    text: str
    text_bytes: int  # length in UTF-8
    source_bytes: int  # bytes of the file that it took, for a progress bar


def assign_split(split_key: str, valid_fraction: float) -> Split:
    """Assign a document to training or validation by a hash of its key.

    The answer depends on nothing else: not on order, machine or other documents. Raising
    `valid_fraction` moves documents from training to validation and never back.
    """
    digest = hashlib.blake2b(split_key.encode(), digest_size=8, person=b"trinity-split").digest()
    return "valid" if int.from_bytes(digest) < int(valid_fraction * 2**64) else "train"


def list_source_files(sources: Sequence[str], glob: str, report: SkipReport) -> list[SourceFile]:
    """List the files of `sources`: directories, files, or `python-stdlib`; sorted within a source.

    A file reached a second time (through a symbolic link or another source) is reported as a
    duplicate; within a directory the file itself is preferred to a link to it.

    Raises:
        UsageError: a source does not exist or is neither a file nor a directory.
    """
    claimed: set[str] = set()
    files: list[SourceFile] = []
    for source in sources:
        files += _files_of_source(source, glob, claimed, report)
    return files


def _files_of_source(
    source: str, glob: str, claimed: set[str], report: SkipReport
) -> list[SourceFile]:
    if source == PYTHON_STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        names = [n for n in _walk(root, source, report) if _is_stdlib_module(n)]
    elif os.path.isdir(source):
        root = Path(source)
        pattern = glob.split("/")
        names = [n for n in _walk(root, source, report) if _matches(n.split("/"), pattern)]
    elif os.path.isfile(source):
        root, names = Path(source).parent, [Path(source).name]
        source = str(root)
    else:
        raise UsageError(
            f"source {source} is not there: give a directory, a text file, a .jsonl or .jsonl.gz "
            f"file, or {PYTHON_STDLIB}"
        )
    found = []
    # Links last, so that a file is known by its own name where both are present.
    for name in sorted(names, key=lambda n: ((root / n).is_symlink(), n)):
        file = _describe(root, name, f"{source.rstrip('/')}/{printable(name)}", report)
        if file is None:
            continue
        real = os.path.realpath(file.path)
        if real in claimed:
            report.add(Skip.DUPLICATE, file.label)
        else:
            claimed.add(real)
            found.append(file)
    return sorted(found, key=lambda file: file.name)


def _walk(root: Path, label: str, report: SkipReport) -> Iterator[str]:
    """Yield relative names of everything below `root` that is not a directory."""

    def unreadable(error: OSError) -> None:
        report.add(Skip.UNREADABLE, f"{printable(str(error.filename))} ({error.strerror})")

    for directory, subdirectories, names in os.walk(root, onerror=unreadable):
        relative = os.path.relpath(directory, root)
        prefix = "" if relative == "." else f"{relative}/"
        for name in subdirectories:
            if os.path.islink(os.path.join(directory, name)):
                report.add(Skip.LINKED_DIRECTORY, f"{label}/{printable(prefix + name)}")
        yield from (prefix + name for name in names)


def _describe(root: Path, name: str, label: str, report: SkipReport) -> SourceFile | None:
    path = root / name
    try:
        status = path.stat()
    except OSError as error:
        report.add(Skip.UNREADABLE, f"{label} ({error.strerror})")
        return None
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        report.add(Skip.NOT_A_FILE, label)
        return None
    return SourceFile(path, printable(name), label, status.st_size, status.st_mtime_ns)


def _is_stdlib_module(name: str) -> bool:
    return name.endswith(".py") and _STDLIB_EXCLUDED.isdisjoint(name.split("/"))


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Match a relative path against a glob, component by component; `**` is any number of them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return (
        bool(parts)
        and fnmatch.fnmatchcase(parts[0], pattern[0])
        and _matches(parts[1:], pattern[1:])
    )


def printable(name: str) -> str:
    """A file name that can be written anywhere: bytes that are not UTF-8 become `\\xNN`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def fingerprint(files: Iterable[SourceFile]) -> str:
    """Digest of the names, sizes and modification times: it changes when the sources do."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0{file.mtime_ns}\n".encode())
    return digest.hexdigest()


def refuse_output_inside_sources(output: Path, sources: Sequence[str]) -> None:
    """Refuse an output that the next run would read as a document.

    Raises:
        UsageError: `output` is inside a source directory.
    """
    target = Path(os.path.realpath(output))
    for source in sources:
        is_directory = source != PYTHON_STDLIB and os.path.isdir(source)
        if is_directory and target.is_relative_to(os.path.realpath(source)):
            raise UsageError(f"output {output} is inside source {source}: choose a place outside")


def is_compressed(file: SourceFile) -> bool:
    """Whether the file's size says little about the size of the text in it."""
    return file.name.endswith(".gz")


def iterate_documents(
    files: Iterable[SourceFile], json_key: str, report: SkipReport
) -> Iterator[Document]:
    """Yield the documents of `files` in order; what cannot be used goes to `report`.

    Files ending in `.jsonl` or `.jsonl.gz` hold one JSON object a line with the text under
    `json_key`; all others are one document each. Text is UTF-8, taken exactly as it is.
    """
    for file in files:
        if file.name.endswith(JSON_LINES_SUFFIXES):
            yield from _json_lines(file, json_key, report)
        else:
            document = _text_file(file, report)
            if document is not None:
                yield document


def _text_file(file: SourceFile, report: SkipReport) -> Document | None:
    try:
        raw = file.path.read_bytes()
    except OSError as error:
        report.add(Skip.UNREADABLE, f"{file.label} ({error.strerror})")
        return None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        report.add(Skip.NOT_TEXT, file.label)
        return None
    return _checked(Document(file.label, file.name, text, len(raw), len(raw)), report)


def _json_lines(file: SourceFile, json_key: str, report: SkipReport) -> Iterator[Document]:
    number = 0
    try:
        with _open_binary(file) as stream:
            for number, line in enumerate(stream, 1):
                document = _json_line(line, f"{file.label}:{number}", json_key, report)
                if document is not None:
                    yield document
    except (OSError, EOFError, zlib.error) as error:
        report.add(Skip.UNREADABLE, f"{file.label} after line {number} ({error})")


def _open_binary(file: SourceFile) -> IO[bytes]:
    if is_compressed(file):
        return cast(IO[bytes], gzip.open(file.path, "rb"))
    return open(file.path, "rb")


def _json_line(line: bytes, name: str, json_key: str, report: SkipReport) -> Document | None:
    if not line.strip():
        report.add(Skip.EMPTY, name)
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
    try:
        raw = text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; UTF-8 cannot
        report.add(Skip.NOT_TEXT, name)
        return None
    key = hashlib.blake2b(raw, digest_size=16).hexdigest()
    return _checked(Document(name, key, text, len(raw), len(line)), report)


def _checked(document: Document, report: SkipReport) -> Document | None:
    if not document.text or document.text.isspace():
        report.add(Skip.EMPTY, document.name)
        return None
    if "\0" in document.text:
        report.add(Skip.NOT_TEXT, document.name)
        return None
    return document
