"""The pages of the guide that are printed from tables: `python -m tests.pages` writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from megatron_trinity.arguments.cuda import CUDA_ONLY
from megatron_trinity.arguments.installed import NEEDS
from megatron_trinity.arguments.model import REPLACED_REFUSALS
from megatron_trinity.arguments.numbers import LEAST
from megatron_trinity.arguments.refusal import Refusal, printed
from megatron_trinity.arguments.refusals import REFUSALS
from megatron_trinity.arguments.schedule import TOKEN_REFUSALS
from megatron_trinity.arguments.verdicts.needs_cuda import NEEDS_CUDA
from megatron_trinity.arguments.verdicts.refused import REFUSED
from megatron_trinity.arguments.verdicts.table import Example, same_answer, works
from megatron_trinity.planning.layouts import RECOMMENDED
from megatron_trinity.reporting import names
from megatron_trinity.reporting.schema import KINDS
from megatron_trinity.upstream.adaptations import ADAPTATIONS, MODULES
from tests.distributed.layouts import FEATURES, LAYOUTS, MAX_RANKS, cannot_meet, ranks_of
from tests.package_map import map_page
from tests.paths import ROOT
from tests.verification import verification_page

DOCS = ROOT / "docs"


def refusals() -> str:
    """What `arguments/` refuses, a line a row."""
    return f"""# What is refused

These are refused at start, before anything is built, with exit code 2 and one line that says what
to use instead. Megatron's own checks come after them. The tables are those of
`megatron_trinity/arguments/`, a file a subject, printed by `python -m tests.pages`; each row has a
test.

| name | what, why, and what to use instead |
|---|---|
{_rows(REFUSALS)}

## Before anything follows from what was given
Numbers that are out of their range; a row of `numbers.py` has many flags.

| flags | what to use |
|---|---|
{_ranges()}

Megatron's flags whose place a Trinity flag takes, and lengths that do not go together.

| name | what, and what to use instead |
|---|---|
{_rows((*REPLACED_REFUSALS, *TOKEN_REFUSALS))}

## What needs CUDA
Refused on a machine without it, all of them in one line, and where the package that it needs
[is not installed](gpus.md#what-is-installed).

| flag | what to do without CUDA | needs |
|---|---|---|
{_needs_cuda()}
"""


def _rows(table: Iterable[Refusal]) -> str:
    return "\n".join(f"| {row.name} | {row.printed()} |" for row in table)


def _ranges() -> str:
    return "\n".join(f"| {_listed(flags.split())} | {use} |" for use, (_, flags) in LEAST.items())


def _needs_cuda() -> str:
    return "\n".join(
        f"| `{rule.flag}` | {printed(rule.instead)} | "
        f"{NEEDS[rule.flag].name if rule.flag in NEEDS else 'CUDA'} |"
        for rule in CUDA_ONLY
    )


def adaptations(when: str) -> str:
    """Those of `upstream/` that are made at this time, a line each."""
    rows = "\n".join(
        f"| `{a.name}` | {_summary(MODULES[a.name])} | {a.reason} | {a.remove_when} |"
        for a in ADAPTATIONS
        if a.when == when
    )
    return f"| name | what it does | why | goes when |\n|---|---|---|---|\n{rows}\n"


def _summary(module: ModuleType) -> str:
    return (module.__doc__ or "").partition("\n")[0].rstrip(".")


def upstream() -> str:
    """docs/upstream.md, with its tables."""
    text = (DOCS / "upstream.md").read_text()
    for when in ("always", "without_cuda"):
        before, mark, rest = text.partition(f"<!-- adaptations: {when} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        text = before + mark + adaptations(when) + end + after
    return text


def flags() -> str:
    """The verdict on each of Megatron's flags."""
    of_reason = "\n".join(
        f"| {_marked(reason)} | {_listed(flags.split())} |" for reason, flags in REFUSED.items()
    )
    of_use = "\n".join(f"| {use} | {_listed(flags.split())} |" for use, flags in NEEDS_CUDA.items())
    return f"""# Megatron's flags

Every flag of megatron-core 0.19.2 has one of four verdicts. The tables are those of
`megatron_trinity/arguments/verdicts/`, printed by `python -m tests.pages`;
`tests/distributed/test_flags.py` walks Megatron's parser, and runs each flag of the first two
tables for a few steps. Where flags do not go together, [what is refused](refusals.md) says so.
Trinity's own flags are in `--help`.

## Works
It changes what is computed; a run with it has other losses or gradient norms than one without.

| flag | tried with |
|---|---|
{_tried(works())}

## Same answer
It changes speed, memory, files or the log; losses and gradient norms are those without it.

| flag | tried with |
|---|---|
{_tried(same_answer())}

## Refused
Off its default it ends the start with exit code 2 and this reason.

| reason | flags |
|---|---|
{of_reason}

## Needs CUDA
Refused on a machine without it; with it, as Megatron has it, where
[what it needs](refusals.md#what-needs-cuda) is installed.

| for | flags |
|---|---|
{of_use}
"""


def _tried(examples: Iterable[Example]) -> str:
    return "\n".join(f"| `{e.flag}` | {_trial(e)} |" for e in examples)


def _trial(example: Example) -> str:
    if example.shown_by is not None:
        return f"`{example.shown_by}`"
    if example.untried is not None:
        return f"not tried: {example.untried}"
    words = " ".join((*example.words, *example.needed, *example.base))
    ranks = f", on {example.ranks} ranks" if example.ranks > 1 else ""
    return f"`{words}`{ranks}".replace("|", "\\|")


def _listed(flags: Iterable[str]) -> str:
    return ", ".join(f"`{flag}`" for flag in flags)


def _marked(text: str) -> str:
    return re.sub(r"--[a-z0-9][a-z0-9-]*", lambda flag: f"`{flag[0]}`", text)


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


def log() -> str:
    """docs/log.md, with its tables."""
    text = (DOCS / "log.md").read_text()
    for mark, table in (("events", _events()), ("names", names.table())):
        before, begin, rest = text.partition(f"<!-- {mark} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        text = before + begin + table + "\n" + end + after
    return text


def _events() -> str:
    rows = [
        f"| `{name}` | {kind.when} | "
        + "; ".join(f"`{field}`: {meaning}" for field, meaning in kind.fields.items())
        + " |"
        for name, kind in KINDS.items()
    ]
    return "\n".join(["| kind | written | fields |", "|---|---|---|", *rows])


def recommended_layouts() -> str:
    """The table of docs/scale.md."""
    rows = [
        f"| {layout.preset} | {layout.world_size} | `{_quoted(layout.flags)}` |"
        for layout in RECOMMENDED
    ]
    return "\n".join(["| preset | GPUs | flags |", "|---|---|---|", *rows])


def _quoted(flags: tuple[str, ...]) -> str:
    # What a shell would take apart is quoted, and a bar would end a cell of the table.
    words = (f"'{word}'" if "|" in word else word for word in flags)
    return " ".join(words).replace("|", "\\|")


def _code(words: tuple[str, ...]) -> str:
    # A vertical bar would end the cell.
    return f"`{' '.join(words)}`".replace("|", "\\|") if words else ""


def pages() -> Iterator[tuple[Path, str]]:
    """Path and text of each page."""
    yield DOCS / "refusals.md", refusals()
    yield DOCS / "flags.md", flags()
    yield DOCS / "layouts.md", layouts()
    yield DOCS / "upstream.md", upstream()
    yield DOCS / "log.md", log()
    yield DOCS / "map.md", map_page()
    yield DOCS / "verification.md", verification_page()


if __name__ == "__main__":
    for path, text in pages():
        path.write_text(text)
