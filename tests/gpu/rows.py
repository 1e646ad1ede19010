"""The rows of the suite: what was measured, against what, and what that says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

HELD, FELL_SHORT, MEASURED = "held", "fell short", "measured"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        case: what was measured.
        value: the figure; None where there is none.
        unit: of the figure, and of what it is compared with.
        against: what it is compared with, in words and with its figure.
        verdict: `held`, `fell short`, `measured`, or `skipped: why` or `failed: why`.
        correctness: whether falling short makes the suite fail.
        subject: that it belongs to; set by the runner.
    """

    case: str
    value: float | None
    unit: str
    against: str
    verdict: str
    correctness: bool = False
    subject: str = ""

    @property
    def fails(self) -> bool:
        return self.verdict.startswith("failed") or (
            self.correctness and self.verdict == FELL_SHORT
        )


def at_most(case: str, value: float, bound: float, unit: str = "relative error") -> Row:
    """A claim that has to hold: the suite fails where it does not, and where the value is NaN."""
    verdict = HELD if value <= bound else FELL_SHORT
    return Row(case, value, unit, f"at most {bound:.3g}", verdict, correctness=True)


def beside(
    case: str,
    figures: tuple[float, float],
    name: str,
    unit: str,
    *,
    more_is_better: bool = False,
    at_least: float = 1.0,
) -> Row:
    """Our figure beside that of `name`: held where the ratio, above 1 for ours, is `at_least`."""
    value, peer = figures
    over, under = (value, peer) if more_is_better else (peer, value)
    ratio = over / under if under else float("inf")
    verdict = HELD if ratio >= at_least else FELL_SHORT
    return Row(case, value, unit, f"{name}: {peer:.4g} (ratio {ratio:.2f})", verdict)


def measured(case: str, value: float, unit: str, against: str = "") -> Row:
    """A figure that is told, with nothing that it has to hold."""
    return Row(case, value, unit, against, MEASURED)


def as_toy(row: Row) -> Row:
    """At toy size speed and memory say nothing, so that they hold nothing there."""
    told = not row.correctness and row.verdict in (HELD, FELL_SHORT)
    return replace(row, verdict=MEASURED) if told else row


def skipped(case: str, why: str) -> Row:
    return Row(case, None, "", "", f"skipped: {why}")


def failed(case: str, why: str) -> Row:
    return Row(case, None, "", "", f"failed: {why}", correctness=True)


def read_rows(file: Path, subject: str) -> list[Row]:
    """The rows that a subject has written, a line each."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [Row(**{**json.loads(line), "subject": subject}) for line in lines]


def append_row(file: Path, row: Row) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps(asdict(row)) + "\n")


def write_json(file: Path, machine: str, rows: Sequence[Row]) -> None:
    """Everything, with the machine that it is from; NaN and infinity are strings."""

    def plain(row: Row) -> dict[str, object]:
        fields = asdict(row)
        if row.value is not None and not abs(row.value) < float("inf"):
            fields["value"] = str(row.value)
        return fields

    found = {"machine": machine, "rows": [plain(row) for row in rows]}
    file.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")


def print_rows(title: str, rows: Sequence[Row]) -> None:
    table = Table(title=title)
    for column in ("subject", "case", "value", "unit", "against", "verdict"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for row in rows:
        value = "" if row.value is None else f"{row.value:.4g}"
        table.add_row(row.subject, row.case, value, row.unit, row.against, row.verdict)
    # A pipe has no width of its own, and a row that is cut says nothing.
    Console(width=200, soft_wrap=False).print(table)
