"""The figures of a benchmark, as rows that all benchmarks write alike."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict


class Row(TypedDict):
    """One comparison; a ratio above 1 is in favour of `ours`.

    `peer` is None where there is nothing to compare with, and `ratio` where there is none.
    """

    case: str
    ours: float
    peer: float | None
    unit: str
    ratio: float | None


def make_row(
    case: str, ours: float, peer: float | None, unit: str, *, more_is_better: bool = False
) -> Row:
    """A row with its ratio; of what is measured, less is better unless it says otherwise."""
    ratio = None
    if peer is not None:
        over, under = (ours, peer) if more_is_better else (peer, ours)
        ratio = over / under if under else None
    return {"case": case, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio}


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--json`, for `write_rows`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as rows")


def write_rows(file: Path | None, rows: Sequence[Row]) -> None:
    """Write a list of rows as JSON, if there is a file to write."""
    if file is not None:
        file.write_text(json.dumps(rows, indent=2) + "\n")
