"""The GPU suite itself: its rows, its exit codes, and all of it at toy size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_trinity.arguments.precision import FP8_WORDS
from tests.environments import prepared
from tests.gpu.__main__ import SUBJECTS
from tests.gpu.children import Failure, failure_of, last_line
from tests.gpu.rows import FELL_SHORT, HELD, MEASURED, as_toy, at_most, beside
from tests.paths import ROOT


def test_verdicts() -> None:
    assert at_most("a", 1.0, 1.0).verdict == HELD
    worse = at_most("a", 1.1, 1.0)
    assert worse.verdict == FELL_SHORT
    assert worse.fails
    assert at_most("a", float("nan"), 1.0).fails
    faster = beside("b", (1.0, 2.0), "peer", "ms")
    assert (faster.verdict, faster.against) == (HELD, "peer: 2 (ratio 2.00)")
    slower = beside("b", (1.0, 2.0), "peer", "tokens/s", more_is_better=True)
    assert slower.verdict == FELL_SHORT
    assert not slower.fails
    assert as_toy(slower).verdict == MEASURED
    assert as_toy(worse) == worse
    assert last_line("x\nerror: told\nTraceback") == "error: told"


def test_what_is_refused_is_no_failure_of_the_suite(tmp_path: Path) -> None:
    """A recipe that the card lacks is a row that was skipped; anything else is one that fails."""

    def outcome(code: int, told: str) -> Failure | None:
        words = ["-c", f"import sys; print({told!r}); sys.exit({code})"]
        return failure_of(words, tmp_path / "output")

    assert outcome(0, "error: none") is None
    assert outcome(2, "error: the card lacks it") == Failure("error: the card lacks it", True)
    assert outcome(1, "error: it broke") == Failure("error: it broke")
    assert outcome(2, "usage: python") == Failure("usage: python")
    words = ["-c", "import time; time.sleep(60)"]
    assert failure_of(words, tmp_path / "output", 0.1) == Failure("not done after 0.1 s")


def suite(tmp_path: Path, *words: str) -> tuple[int, list[dict[str, Any]], str]:
    file = tmp_path / "rows.json"
    answer = subprocess.run(
        [sys.executable, "-m", "tests.gpu", "--json", str(file), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    return answer.returncode, rows, answer.stderr


@pytest.mark.slow
def test_a_subject_that_fails_is_a_row(tmp_path: Path) -> None:
    code, rows, told = suite(tmp_path, "--toy", "tests.gpu.broken", "norm")
    assert code == 1
    assert [row["verdict"] for row in rows[:2]] == [HELD, "failed: RuntimeError: it breaks"]
    assert {row["subject"] for row in rows} == {"tests.gpu.broken", "norm"}
    assert "1 of 26 rows fail" in told
    values = [row["value"] for row in rows if row["correctness"] and row["subject"] == "norm"]
    assert len(values) == 18
    assert all(0 < value < 4e-3 for value in values)


@pytest.mark.slow
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    code, rows, told = suite(tmp_path)
    assert (code, rows) == (2, [])
    assert "there is no GPU here; --toy" in told


@pytest.mark.slow
def test_a_folder_without_wheels_is_refused(tmp_path: Path) -> None:
    script = ROOT / "tests/run_gpu.sh"
    (tmp_path / "empty").mkdir()
    for folder, told in (("none", "no such folder"), ("empty", "it holds no wheels")):
        words = ["bash", str(script), "--wheels", str(tmp_path / folder)]
        answer = subprocess.run(words, capture_output=True, text=True)
        assert answer.returncode == 2
        assert answer.stderr == f"error: --wheels {tmp_path / folder}: {told}\n"


WITH_ENGINE = ("layers", "fp8")


def check_subject(folder: Path, subject: str) -> list[str]:
    """Run it at toy size, where it has to hold; the cases that it held."""
    code, rows, told = suite(folder, "--toy", subject)
    assert code == 0, told
    held = [row for row in rows if row["correctness"]]
    assert held
    assert all(row["verdict"] == HELD for row in held)
    return [row["case"] for row in held]


# The norm is among those above.
@pytest.mark.slow
@pytest.mark.parametrize("subject", [x for x in SUBJECTS if x not in ("norm", *WITH_ENGINE)])
def test_a_subject_at_toy_size(tmp_path: Path, subject: str) -> None:
    check_subject(tmp_path, subject)


@pytest.mark.slow
@pytest.mark.te
def test_layers_at_toy_size(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    prepared(request, "te")
    assert len(check_subject(tmp_path, "layers")) == 8


@pytest.mark.slow
@pytest.mark.te
def test_fp8_at_toy_size(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    prepared(request, "te")
    held = check_subject(tmp_path, "fp8")
    assert held == [f"{recipe}: off bf16" for recipe in FP8_WORDS[:2]]
