"""The pages of the guide that are printed from tables: `python -m tests.pages` writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_trinity.validation import REFUSALS
from tests.distributed.layouts import FEATURES, LAYOUTS, MAX_RANKS, cannot_meet, ranks_of
from tests.paths import ROOT

DOCS = ROOT / "docs"


def refusals() -> str:
    """`validation.REFUSALS`, a line a row."""
    rows = "\n".join(f"| {row.name} | {_prose(row.message)} |" for row in REFUSALS)
    return f"""# What is refused

These are refused at start, before anything is built, with exit code 2 and one line that says what
to use instead. Megatron's own checks come after them. The table is
`megatron_trinity/validation.py`, printed by `python -m tests.pages`; each row has a test.

| name | what, why, and what to use instead |
|---|---|
{rows}
"""


def layouts() -> str:
    """The layouts in which tests prove one answer."""
    features = "\n".join(
        f"| {axis} | {name} | {_code(words) or 'more ranks'} |"
        for axis, of_axis in FEATURES.items()
        for name, words in of_axis.items()
    )
    table = "\n".join(f"| {ranks_of(layout)} | {', '.join(layout)} |" for layout in LAYOUTS)
    pairs = "\n".join(f"| {one} | {other} | {why} |" for one, other, why in cannot_meet())
    return f"""# Layouts

From the same initial weights and global batches, each layout below gives what one rank gives: every
logged loss, the gradient norm and the load of the experts to 1e-6 relative in each of three steps;
after them every weight and expert bias to 1e-5, and every first moment and momentum, which are sums
of the gradients, to 1e-5 of its norm; all in fp32 (`tests/distributed/test_layouts.py`). Expert
balancing, the sequence-wise loss and z-loss are on. With Muon gradients and their norm are held to
4e-5 from the second step on: Newton-Schulz stretches rounding errors of gradients that lack rank.

Not every combination is run: every two features that fit on {MAX_RANKS} ranks meet at least once.
What cannot work is [refused at start](refusals.md). The tables are `tests/distributed/layouts.py`,
printed by `python -m tests.pages`.

## Features
| axis | feature | flags |
|---|---|---|
{features}

Without a feature of an axis: one rank of it, micro-batches of 2, no recompute, documents not told
apart, the alltoall dispatcher, AdamW. A "2" or "4" that divides data (EP, ETP) needs as many ranks.

## Layouts that are run
| ranks | features |
|---|---|
{table}

## Pairs that are not run
| | | |
|---|---|---|
{pairs}
"""


def _code(words: tuple[str, ...]) -> str:
    # A vertical bar would end the cell.
    return f"`{' '.join(words)}`".replace("|", "\\|") if words else ""


def _prose(message: str) -> str:
    """A message without the values of one run: `--flag {flag}` becomes `--flag`."""
    message = re.sub(r" \{(?!world_size)\w+\}", "", message).replace("{world_size}", "The")
    message = re.sub(r"--[a-z][a-z-]*[a-z]", lambda flag: f"`{flag[0]}`", message)
    return message[0].upper() + message[1:]


def pages() -> Iterator[tuple[Path, str]]:
    """Path and text of each page."""
    yield DOCS / "refusals.md", refusals()
    yield DOCS / "layouts.md", layouts()


if __name__ == "__main__":
    for path, text in pages():
        path.write_text(text)
