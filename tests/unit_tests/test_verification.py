"""What is written down as verified is what has passed, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT
from tests.verification import CLAIMS, PRESETS, PROPERTY, Recorder, recorded

ONE, OTHER = CLAIMS[0], CLAIMS[1]


def report(
    test: str, preset: str, outcome: Any = "passed", when: Any = "call"
) -> pytest.TestReport:
    made = pytest.TestReport(f"{test}[case]", ("", 0, ""), {}, outcome, None, when)
    made.user_properties = [(PROPERTY, preset)]
    return made


def session(folder: Path, *reports: pytest.TestReport) -> dict[str, dict[str, int]]:
    """Claims of each preset, and their cases, behind a session with these reports."""
    recorder = Recorder(folder)
    for one in reports:
        recorder.pytest_runtest_logreport(one)
    recorder.pytest_sessionfinish()
    rows = {preset: recorded(preset, folder) for preset in PRESETS}
    return {preset: {row["what"]: row["cases"] for row in of} for preset, of in rows.items() if of}


def test_what_passes_is_written_and_what_fails_is_taken_away(tmp_path: Path) -> None:
    passed = report(ONE.test, "nano")
    assert session(tmp_path, passed, passed, report(ONE.test, "nano", when="teardown")) == {
        "nano": {ONE.what: 2}
    }
    # What does not run stays as it was, and other presets are other files.
    assert session(tmp_path, report(OTHER.test, "nano"), report(OTHER.test, "mini")) == {
        "nano": {ONE.what: 2, OTHER.what: 1},
        "mini": {OTHER.what: 1},
    }
    failed = report(ONE.test, "nano", "failed")
    assert session(tmp_path, passed, failed)["nano"] == {OTHER.what: 1}
    broken = report(OTHER.test, "mini", "failed", when="setup")
    assert session(tmp_path, broken) == {"nano": {OTHER.what: 1}}
    assert session(tmp_path, report(OTHER.test, "mini", "skipped")) == {"nano": {OTHER.what: 1}}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.test.rpartition("::")[2])
def test_each_claim_has_its_test(claim: Any) -> None:
    file, _, name = claim.test.partition("::")
    text = (ROOT / file).read_text()
    assert re.search(rf"^def {name}\(", text, re.MULTILINE)
    assert claim.preset is None or claim.preset in PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_recorded_is_claimed(preset: str) -> None:
    rows = recorded(preset)
    assert rows
    claims = {(claim.what, claim.test) for claim in CLAIMS if claim.preset in (None, preset)}
    assert {(row["what"], row["how"]) for row in rows} <= claims
    assert all(row["cases"] > 0 and row["when"] and row["with"]["torch"] for row in rows)
