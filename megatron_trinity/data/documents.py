"""Documents, the split that each belongs to, and the report of what was left out.

A document has a `split_key`, on which alone depends whether it is trained on or validated on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

Split = Literal["train", "valid"]

PYTHON_STDLIB = "python-stdlib"
"""The source name that stands for the running interpreter's own standard library."""

STANDARD_INPUT = "-"
"""The source name that stands for standard input."""

DEFAULT_VALID_FRACTION = 0.05
"""The share of documents for validation: the same default for the tokenizer and for the dataset."""

MAX_DOCUMENT_BYTES = 1 << 27
"""Of a document, or of a line that holds one: what bounds the memory of a process."""


class Skip(StrEnum):
    """Why a document, or a file that might have held some, is left out."""

    UNREADABLE = "unreadable"
    EMPTY = "empty or only white space"
    NOT_TEXT = "not text (not UTF-8, or holds a NUL)"
    UTF16 = "UTF-16 (convert it: iconv -f utf-16 -t utf-8)"
    OTHER_FORMAT = "of another format than the name says"
    BAD_JSON = "malformed JSON line"
    NO_TEXT_KEY = "JSON line without a string under the text key"
    NO_VALUE = "row without a value in the text column"
    DUPLICATE = "the same file as another"
    LINKED_DIRECTORY = "symbolic link to a directory, not followed"
    NOT_A_FILE = "not a regular file"
    METADATA = "not data of its `datasets` directory"
    NO_TOKENS = "no tokens"
    TOO_LARGE = "too large: above 128 MiB, or above 2 MiB without a line end to encode up to"
    TOO_LONG = "more than 2^31 - 1 tokens"


@dataclass
class SkipReport:
    """What was left out, by reason: how many, and the names of the first of them in order."""

    names: dict[Skip, list[str]] = field(default_factory=dict)
    counts: dict[Skip, int] = field(default_factory=dict)

    NAMED = 100
    """Names kept of each reason: all others are counted alone."""

    def __post_init__(self) -> None:
        for reason, names in self.names.items():
            self.counts.setdefault(reason, len(names))

    def add(self, reason: Skip, name: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        if len(names) < self.NAMED:
            names.append(name)

    def extend(self, other: SkipReport) -> None:
        """Add what was left out after what is here."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            names = self.names.setdefault(reason, [])
            names += other.names.get(reason, [])[: self.NAMED - len(names)]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """For a manifest: `{reason: {"count": n, "names": [the first ones]}}`."""
        return {
            reason.value: {"count": count, "names": list(self.names.get(reason, []))}
            for reason, count in sorted(self.counts.items())
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SkipReport:
        """The report that `as_dict` gave."""
        found = {Skip(reason): entry for reason, entry in content.items()}
        return cls(
            {reason: list(entry["names"]) for reason, entry in found.items()},
            {reason: entry["count"] for reason, entry in found.items()},
        )

    def summary(self, shown: int = 3) -> list[str]:
        """One line a reason for people, with the first `shown` names."""
        lines = []
        for reason, count in sorted(self.counts.items()):
            names = self.names.get(reason, [])[:shown]
            more = f", and {count - len(names):,} more" if count > len(names) else ""
            lines.append(f"{count:,} {reason.value}: {', '.join(names)}{more}")
        return lines


@dataclass(frozen=True, slots=True)
class Document:
    """One document.

    `split_key` is the file's relative name, or for a line or a row the digest of its text, since
    its number would change when another is inserted above it.
    """

    name: str
    split_key: str
    text: str
    text_bytes: int  # length in UTF-8
    is_code: bool = False  # by the suffix of its file


def assign_split(split_key: str, valid_fraction: float) -> Split:
    """Assign a document to training or validation by a hash of its key.

    The answer depends on nothing else: not on order, machine or other documents. Raising
    `valid_fraction` moves documents from training to validation and never back.
    """
    digest = hashlib.blake2b(split_key.encode(), digest_size=8, person=b"trinity-split").digest()
    return "valid" if int.from_bytes(digest) < int(valid_fraction * 2**64) else "train"


def printable(name: str) -> str:
    """A file name that can be written anywhere: bytes that are not UTF-8 become `\\xNN`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
