"""The files of sources, one after the other in an order that every machine finds alike.

A listing is a generator that holds one directory's names at a time: it is made anew for each use.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_trinity.data import remote
from megatron_trinity.data.documents import (
    PYTHON_STDLIB,
    STANDARD_INPUT,
    Skip,
    SkipReport,
    printable,
)
from megatron_trinity.data.formats import Format, Kind, format_of, why_unknown
from megatron_trinity.errors import UsageError

# Third-party packages differ from machine to machine. Tests are two thirds of the bytes, hold files
# that are broken on purpose, and are left out of the interpreter by some Linux distributions.
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}

_DATASET_STATE, _DATASET_INFO = "state.json", "dataset_info.json"
_DATASET_DICT = "dataset_dict.json"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that holds documents."""

    path: str  # local, or a URL
    name: str  # relative to its source, with "/": the same on every machine
    label: str  # for people: the source as given, and the name
    size: int  # bytes
    stamp: str  # changes when the content does: the time of modification in ns, or a remote's own
    format: Format | None  # None: its name says none that is known


@dataclass(frozen=True)
class Survey:
    """All files together. `bytes_known`: whether their size says how much text there is."""

    files: int
    bytes: int
    fingerprint: str
    bytes_known: bool


def expand_lists(sources: Sequence[str]) -> list[str]:
    """Put what a list names in the place of each `@LIST`, a file with one source a line.

    Raises:
        UsageError: a list cannot be read, or names nothing.
    """
    expanded: list[str] = []
    for source in sources:
        if not source.startswith("@"):
            expanded.append(source)
            continue
        try:
            with open(source[1:], encoding="utf-8", errors="surrogateescape") as stream:
                named = [line for line in (line.strip() for line in stream) if line]
        except OSError as error:
            raise UsageError(f"list {source[1:]} cannot be read: {error.strerror}") from error
        if not named:
            raise UsageError(f"list {source[1:]} names no source")
        expanded += named
    return expanded


def source_files(
    sources: Sequence[str], glob: str, report: SkipReport, given: Kind | None = None
) -> Iterator[SourceFile]:
    """The files of `sources`, sorted by name within a directory; `given` is the format of all.

    A file reached a second time (through a symbolic link or another source) is reported as a
    duplicate; within a directory the file itself is preferred to a link to it.

    Raises:
        UsageError: a source does not exist or is neither a file nor a directory.
    """
    reached = _Reached(glob)
    for source in sources:
        if source == STANDARD_INPUT:
            format_ = Format(given or Kind.JSON_LINES)
            yield SourceFile(source, source, "standard input", 0, "", format_)
        elif remote.is_remote(source):
            for found in remote.list_files(source):
                if _matches(found.name.split("/"), glob.split("/")) or found.is_source:
                    format_ = format_of(found.name, given)  # type: ignore[assignment]
                    yield SourceFile(
                        found.url, found.name, found.url, found.size, found.stamp, format_
                    )
        else:
            yield from _local(source, reached, report, given)


def survey(files: Iterable[SourceFile]) -> Survey:
    """Walk over `files` once.

    Raises:
        UsageError: names that say no known format; the line has the first, and their suffixes.
    """
    digest = hashlib.blake2b(digest_size=16)
    count = size = 0
    known = True
    unknown: dict[str, str] = {}
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0{file.stamp}\n".encode())
        count += 1
        size += file.size
        known = known and file.path != STANDARD_INPUT
        if file.format is None:
            why = why_unknown(file.name)
            if why not in unknown and len(unknown) < 5:
                unknown[why] = file.label
        elif file.format.compression or file.format.kind in (Kind.PARQUET, Kind.ARROW):
            known = known and file.format.compression is None
    if unknown:
        what = "; ".join(f"{label}: {why}" for why, label in unknown.items())
        raise UsageError(
            f"{what}. Leave such files out with --glob, or say what all files are with --format"
        )
    return Survey(count, size, digest.hexdigest(), known)


class _Reached:
    """Which local files the sources so far have, without a list of them."""

    def __init__(self, glob: str) -> None:
        self.pattern = glob.split("/")
        self.trees: list[_Tree] = []
        self.single: set[str] = set()  # real paths of files that were named, or are behind links


@dataclass(frozen=True)
class _Tree:
    """A directory by its real path; `pattern` is None for the standard library's."""

    root: str
    pattern: Sequence[str] | None

    def takes(self, name: str) -> bool:
        """Whether a file of this relative name is one of the source."""
        if self.pattern is None:
            return _is_stdlib_module(name)
        return _matches(name.split("/"), self.pattern)

    def has(self, real: str) -> bool:
        """Whether it has the file itself, not only a link to it."""
        return real.startswith(f"{self.root}/") and self.takes(real[len(self.root) + 1 :])


def _local(
    source: str, reached: _Reached, report: SkipReport, given: Kind | None
) -> Iterator[SourceFile]:
    if source == PYTHON_STDLIB:
        root, names = sysconfig.get_path("stdlib"), None
    elif os.path.isdir(source):
        root, names = source, None
    elif os.path.lexists(source):
        root, names = os.path.dirname(source), [os.path.basename(source)]
    else:
        raise UsageError(
            f"source {source} is not there: give a directory, a file, @LIST, a URL, "
            f"{STANDARD_INPUT} for standard input, or {PYTHON_STDLIB}"
        )
    tree = _Tree(os.path.realpath(root), None if source == PYTHON_STDLIB else reached.pattern)
    label = (root if names else source).rstrip("/")
    for name in names or _walk(root, "", label, report):
        if names is None and not tree.takes(name):
            continue
        path = os.path.join(root, name)
        shown = printable(name)
        found = _describe(path, shown, f"{label}/{shown}" if label else shown, report, given)
        if found is None:
            continue
        file, is_link = found
        by_name = is_link or names is not None
        real = os.path.realpath(path) if by_name else os.path.join(tree.root, name)
        trees = [*reached.trees, tree] if is_link and names is None else reached.trees
        if real in reached.single or any(other.has(real) for other in trees):
            report.add(Skip.DUPLICATE, file.label)
            continue
        if by_name:
            reached.single.add(real)
        yield file
    if names is None:
        reached.trees.append(tree)


def _walk(root: str, prefix: str, label: str, report: SkipReport) -> Iterator[str]:
    """Relative names below `root` of all that is not a directory, sorted as whole names are."""
    directory = os.path.join(root, prefix)
    names: list[str] = []
    try:
        with os.scandir(directory.rstrip("/") or "/") as entries:
            for entry in entries:
                if not entry.is_dir():
                    names.append(entry.name)
                elif entry.is_symlink():
                    report.add(
                        Skip.LINKED_DIRECTORY, f"{label}/{printable(f'{prefix}{entry.name}')}"
                    )
                else:
                    names.append(f"{entry.name}/")  # sorts as a part of longer names does
    except OSError as error:
        named = printable(f"{label}/{prefix}".rstrip("/"))
        report.add(Skip.UNREADABLE, f"{named} ({error.strerror})")
        return
    names.sort()
    for name in _data_of(directory, names, f"{label}/{printable(prefix)}", report):
        if name.endswith("/"):
            yield from _walk(root, f"{prefix}{name}", label, report)
        else:
            yield f"{prefix}{name}"


def _data_of(directory: str, names: list[str], label: str, report: SkipReport) -> Sequence[str]:
    """Of a directory that `save_to_disk` wrote the data files alone; of others all names.

    Raises:
        UsageError: it holds several splits, or rows in an order of its own.
    """
    if _DATASET_DICT in names:
        splits = ", ".join(name[:-1] for name in names if name.endswith("/"))
        raise UsageError(
            f"{label.rstrip('/')} is a `datasets` dictionary of the splits {splits}: give the "
            "directory of each split that is meant"
        )
    if _DATASET_STATE not in names or _DATASET_INFO not in names:
        return names
    try:
        with open(os.path.join(directory, _DATASET_STATE), encoding="utf-8") as stream:
            state = json.load(stream)
        data = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{label}{_DATASET_STATE} does not say which files are the data: save the dataset again"
        ) from error
    if state.get("_indices_data_files"):
        raise UsageError(
            f"{label.rstrip('/')} has its rows in an order of its own: save it again with a "
            "current version of `datasets`, which writes them in that order"
        )
    missing = [name for name in data if name not in names]
    if missing:
        raise UsageError(f"{label}{missing[0]} is missing, which {_DATASET_STATE} names")
    for name in sorted(set(names) - set(data)):
        report.add(Skip.METADATA, f"{label}{printable(name)}")
    return data


def _describe(
    path: str, name: str, label: str, report: SkipReport, given: Kind | None
) -> tuple[SourceFile, bool] | None:
    """The file, and whether it is a link."""
    try:
        status = os.lstat(path)
        is_link = stat.S_ISLNK(status.st_mode)
        status = os.stat(path) if is_link else status
    except OSError as error:
        report.add(Skip.UNREADABLE, f"{label} ({error.strerror})")
        return None
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        report.add(Skip.NOT_A_FILE, label)
        return None
    stamp, format_ = str(status.st_mtime_ns), format_of(name, given)
    return SourceFile(path, name, label, status.st_size, stamp, format_), is_link


def _is_stdlib_module(name: str) -> bool:
    return name.endswith(".py") and _STDLIB_EXCLUDED.isdisjoint(name.split("/"))


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Match a relative path against a glob, component by component; `**` is any number of them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        if len(pattern) == 2 and pattern[1] == "*":
            return bool(parts)  # all files: the usual case, of a million files perhaps
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return (
        bool(parts)
        and fnmatch.fnmatchcase(parts[0], pattern[0])
        and _matches(parts[1:], pattern[1:])
    )


def refuse_output_inside_sources(output: os.PathLike[str], sources: Sequence[str]) -> None:
    """Refuse an output that the next run would read as a document.

    Raises:
        UsageError: `output` is inside a source directory.
    """
    target = os.path.realpath(output)
    for source in sources:
        if source == PYTHON_STDLIB or remote.is_remote(source) or not os.path.isdir(source):
            continue
        if f"{target}/".startswith(os.path.realpath(source).rstrip("/") + "/"):
            raise UsageError(f"output {output} is inside source {source}: choose a place outside")
