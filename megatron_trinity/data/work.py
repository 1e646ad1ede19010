"""The directory in which an output is made: gone when done, gone on from after a kill."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_trinity.data.chunks import Place
from megatron_trinity.data.documents import SkipReport, Split
from megatron_trinity.data.manifest import held_directory, read_manifest
from megatron_trinity.data.token_files import SplitWriter, Written

_REQUEST, _JOURNAL = "request.json", "journal.npz"


@dataclass(frozen=True)
class Journal:
    """What was done when it was written: all that a run needs to go on from there."""

    place: Place
    source_bytes: int
    written: dict[Split, Written]
    counts: dict[Split, NDArray[np.int64]]
    report: SkipReport


def work_path(output: Path) -> Path:
    """Where the output of this name is made."""
    return output.parent / f".{output.name}.part"


@contextmanager
def work_directory(output: Path, asked: Mapping[str, Any], resumable: bool) -> Iterator[Path]:
    """A hidden directory beside `output`, with what an earlier run of the same request left in it.

    It stays where an exception ends the work behind a journal, for the next run of the same
    request; what is there of another request is removed.

    Raises:
        TrinityError: it cannot be made or written to, or another process works in it.
    """
    path = work_path(output)
    busy = f"another process prepares {output}: wait for it, or choose another --output"
    with held_directory(path, busy):
        if not resumable or read_manifest(path / _REQUEST) != asked:
            for left in path.iterdir():
                left.unlink()
            (path / _REQUEST).write_text(json.dumps(asked), encoding="utf-8")
        try:
            yield path
        except BaseException:
            if not (path / _JOURNAL).exists():
                shutil.rmtree(path, ignore_errors=True)
            raise
        shutil.rmtree(path, ignore_errors=True)


def remove_work(output: Path) -> None:
    """Remove what a run that was killed between its result and its end has left."""
    shutil.rmtree(work_path(output), ignore_errors=True)


def forget_journal(work: Path) -> None:
    """Make the next run begin anew."""
    (work / _JOURNAL).unlink(missing_ok=True)


def write_journal(
    work: Path,
    place: Place,
    source_bytes: int,
    writers: Mapping[Split, SplitWriter],
    report: SkipReport,
) -> None:
    """Put on the disk what the writers have, then say so."""
    for writer in writers.values():
        writer.flush()
    state = {
        "place": asdict(place),
        "source_bytes": source_bytes,
        "written": {split: asdict(writer.written) for split, writer in writers.items()},
        "report": report.as_dict(),
    }
    counts: dict[str, Any] = {split: writer.counts for split, writer in writers.items()}
    encoded = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8)
    staged = work / f"{_JOURNAL}.new"
    with open(staged, "wb") as stream:
        np.savez(stream, state=encoded, **counts)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(staged, work / _JOURNAL)


def read_journal(work: Path) -> Journal | None:
    """What the last journal says, or None where there is none."""
    try:
        with np.load(work / _JOURNAL) as content:
            state = json.loads(content["state"].tobytes())
            counts = {split: content[split] for split in state["written"]}
    except FileNotFoundError:
        return None
    return Journal(
        Place(**state["place"]),
        state["source_bytes"],
        {split: Written(**written) for split, written in state["written"].items()},
        counts,
        SkipReport.from_dict(state["report"]),
    )
