"""Which format a file has, by its name: one that says nothing known is refused, never guessed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a file holds."""

    TEXT = "text"  # one document
    JSON_LINES = "jsonl"  # one a line
    PARQUET = "parquet"  # one a row
    ARROW = "arrow"  # one a row, Arrow's file (Feather) or stream format


@dataclass(frozen=True, slots=True)
class Format:
    """A kind, and `gz`, `bz2`, `xz` or `zst` where the whole file is compressed."""

    kind: Kind
    compression: str | None = None


COMPRESSIONS = {".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst", ".zstd": "zst"}

RECORD_SUFFIXES = {
    ".jsonl": Kind.JSON_LINES,
    ".ndjson": Kind.JSON_LINES,
    ".json": Kind.JSON_LINES,
    ".jsonlines": Kind.JSON_LINES,
    ".parquet": Kind.PARQUET,
    ".pq": Kind.PARQUET,
    ".arrow": Kind.ARROW,
    ".feather": Kind.ARROW,
}

_PROSE = """
txt text md markdown mdx rst tex bib org adoc asciidoc textile wiki log html htm xhtml xml srt vtt
"""
PROSE_SUFFIXES = frozenset(f".{suffix}" for suffix in _PROSE.split())

_CODE = """
py pyi pyx pxd c h cc cpp cxx hh hpp hxx inl cu cuh cl java kt kts scala sc groovy gradle go rs
swift m mm js mjs cjs jsx ts tsx mts cts vue svelte rb erb php pl pm t raku sh bash zsh fish ksh
csh ps1 psm1 bat cmd lua r rmd jl hs lhs ml mli fs fsi fsx clj cljs cljc edn ex exs erl hrl dart
cs vb f f77 f90 f95 f03 f08 for asm s v sv svh vhd vhdl sql proto thrift graphql cmake mk make
dockerfile tf nix el lisp lsp scm ss rkt vim zig nim d pas pp ada adb ads cob cbl tcl awk sed diff
patch lean agda idr glsl hlsl wgsl vert frag sol css scss sass less yaml yml toml ini cfg conf
properties env in am ac m4 j2 tmpl tpl template bzl bazel star def ld pro qml
"""
CODE_SUFFIXES = frozenset(f".{suffix}" for suffix in _CODE.split())

TEXT_SUFFIXES = PROSE_SUFFIXES | CODE_SUFFIXES

_TABLE = "convert it to JSON lines or Parquet"
_ARCHIVE = "unpack it"
_EXTRACT = "extract its text first"
REMEDIES = {
    **dict.fromkeys((".csv", ".tsv", ".xlsx", ".xls", ".db", ".sqlite", ".orc", ".avro"), _TABLE),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tbz", ".txz", ".7z", ".rar"), _ARCHIVE),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub", ".djvu", ".warc"), _EXTRACT),
    **dict.fromkeys(
        (".lz4", ".br", ".sz", ".snappy", ".lzma"), "compress it as gz, zst, bz2 or xz"
    ),
    ".ipynb": "convert it with jupyter nbconvert",
}
"""What to do about formats that people have and that are not read."""

MAGIC = (
    (b"\x1f\x8b", "gzip data", ".gz"),
    (b"\x28\xb5\x2f\xfd", "zstd data", ".zst"),
    (b"BZh", "bzip2 data", ".bz2"),
    (b"\xfd7zXZ\x00", "xz data", ".xz"),
    (b"PAR1", "Parquet", ".parquet"),
    (b"ARROW1", "Arrow", ".arrow"),
    (b"PK\x03\x04", "a zip archive", None),
    (b"%PDF-", "a PDF", None),
)
"""How files of another format begin, what that is, and the suffix that would say so."""

UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def suffix_of(name: str) -> str:
    """The last suffix in lower case, with its dot; "" for a name that has none or is hidden."""
    base = name.rpartition("/")[2]
    stem, dot, suffix = base.rpartition(".")
    return f".{suffix.lower()}" if dot and stem else ""


def format_of(name: str, given: Kind | None = None) -> Format | None:
    """The format that a name says, or `given` in its place; None where it says nothing known.

    A name without a suffix (README, Makefile) is of text.
    """
    compression = COMPRESSIONS.get(suffix_of(name))
    inner = name[: name.rindex(".")] if compression else name
    if given is not None:
        kind: Kind | None = given
    else:
        suffix = suffix_of(inner)
        is_text = suffix == "" or suffix in TEXT_SUFFIXES
        kind = Kind.TEXT if is_text else RECORD_SUFFIXES.get(suffix)
    # Parquet and Arrow compress their columns, and need to be read from any place.
    if kind is None or (compression and kind in (Kind.PARQUET, Kind.ARROW)):
        return None
    return Format(kind, compression)


def why_unknown(name: str) -> str:
    """What to say of a name that `format_of` does not know."""
    suffix = suffix_of(name)
    if suffix in COMPRESSIONS:
        inner = suffix_of(name[: -len(suffix)])
        return f"{inner}{suffix} is not read: {REMEDIES.get(inner, 'decompress it')}"
    remedy = REMEDIES.get(suffix)
    return f"{suffix} is not read: {remedy}" if remedy else f"{suffix} says no format that is known"


def foreign_content(head: bytes) -> str | None:
    """What the first bytes of a file show it to hold, where that is neither text nor JSON."""
    for mark, what, suffix in MAGIC:
        if head.startswith(mark):
            return f"{what}: give it the suffix {suffix}" if suffix else what
    if head.startswith(UTF16_MARKS):
        return "UTF-16: convert it, with iconv -f utf-16 -t utf-8"
    return None
