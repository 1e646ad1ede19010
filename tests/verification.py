"""What tests verify of each preset, and `docs/verification/PRESET.yaml`, which they write.

`pytest --record-verification` writes an entry for each claim below whose cases have all passed,
with their number, the day and the versions; a claim with a case that fails loses its entry, and one
whose test has not run keeps the one that it has.
"""

from __future__ import annotations

import datetime
import platform
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.paths import ROOT

FOLDER = ROOT / "docs/verification"
PRESETS = ("tiny", "nano", "mini", "large")
PROPERTY = "verifies"
VERSIONS = ("megatron-core", "torch", "transformers", "emerging-optimizers")


@dataclass(frozen=True)
class Claim:
    """Attributes:
    what: is verified.
    test: that does it, as `FILE::NAME`.
    preset: of all of its cases; None where the parameters of a case say it.
    """

    what: str
    test: str
    preset: str | None = None


_UNIT = "tests/unit_tests"
CLAIMS = (
    Claim(
        "sizes, rates, schedule and initial sigma are the published ones",
        f"{_UNIT}/arguments/test_presets.py::test_published_values",
    ),
    Claim(
        "total and active parameters are the published ones",
        f"{_UNIT}/planning/test_parameters.py::test_published_numbers",
    ),
    Claim(
        "the FLOPs of each kind of layer are those of its products",
        f"{_UNIT}/planning/test_flops.py::test_a_layer_is_the_sum_of_its_products",
    ),
    Claim(
        "config.json and the flags of training say the same, there and back",
        f"{_UNIT}/checkpoint/hf/test_config.py::test_a_preset_survives_hugging_faces_configuration",
    ),
    Claim(
        "the trainer takes the recommended layouts",
        f"{_UNIT}/planning/test_layouts.py::test_the_trainer_takes_it",
    ),
    Claim(
        "ranks of the recommended layouts build, and their stages are balanced",
        f"{_UNIT}/planning/test_fake_ranks.py::test_recommended_layouts",
    ),
    Claim(
        "eight ranks of each stage hold the whole model",
        f"{_UNIT}/planning/test_fake_ranks.py::test_eight_ranks_of_each_stage_hold_the_whole_model",
    ),
    Claim(
        "buffers of the optimizer are padded by less than 3 %",
        f"{_UNIT}/planning/test_buffers.py::test_padding_is_less_than_three_percent",
    ),
    Claim(
        "starts on ranks that report an H100",
        "tests/cuda_start/test_start.py::test_presets_start",
    ),
    Claim(
        "starts there in FP8",
        "tests/cuda_start/test_start.py::test_presets_start_in_fp8",
    ),
    Claim(
        "the step of examples/ starts there, with DeepEP and Transformer Engine as stand-ins",
        "tests/cuda_start/test_examples.py::test_it_starts_where_all_is_installed",
    ),
    Claim(
        "has every part of a Trinity model",
        f"{_UNIT}/arguments/test_presets.py::test_tiny_has_everything_that_a_trinity_model_has",
        "tiny",
    ),
    Claim(
        "the quickstart and the commands of the first pages run, with less training",
        "tests/guide/test_guide.py::test_the_first_pages",
        "tiny",
    ),
    Claim(
        "logits and gradients are transformers', in fp32 (a smaller model of each kind)",
        f"{_UNIT}/model/test_hf_parity.py::test_logits_and_gradients_in_fp32",
        "tiny",
    ),
    Claim(
        "a layout gives the answer of one rank (a smaller model)",
        "tests/distributed/test_layouts.py::test_a_layout_gives_the_answer_of_one_rank",
        "tiny",
    ),
    Claim(
        "a resumed run is bitwise the one that was not stopped (a smaller model)",
        "tests/distributed/test_resume.py::test_resume_is_exact",
        "tiny",
    ),
    Claim(
        "an export evaluates with lm-eval to transformers' bits a byte (a smaller model)",
        "tests/clients/test_evaluate.py::test_local_tasks",
        "tiny",
    ),
    Claim(
        "a GGUF file would have every tensor and token of an export (a smaller model)",
        "tests/clients/test_gguf.py::test_names_and_vocabulary",
        "tiny",
    ),
)


def note(items: Iterable[pytest.Item]) -> None:
    """Have the reports of tests that verify a claim say of which preset."""
    claims = {claim.test: claim for claim in CLAIMS}
    for item in items:
        claim = claims.get(item.nodeid.partition("[")[0])
        if claim is not None:
            item.user_properties.append((PROPERTY, claim.preset or _preset_of(item)))


def _preset_of(item: pytest.Item) -> str:
    """The preset that is, or is named by, a parameter of a case."""
    values = getattr(item, "callspec").params.values()  # noqa: B009
    named = (getattr(value, "preset", value) for value in values)
    return next(name for name in named if isinstance(name, str) and name in PRESETS)


class Recorder:
    """Writes the files at the end of a session, where reports of all its processes come in."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._passed: dict[tuple[str, str], int] = defaultdict(int)
        self._failed: set[tuple[str, str]] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid.partition("[")[0]
        for name, preset in report.user_properties:
            if name == PROPERTY and report.failed:
                self._failed.add((test, str(preset)))
            elif name == PROPERTY and report.when == "call" and report.passed:
                self._passed[test, str(preset)] += 1

    def pytest_sessionfinish(self) -> None:
        for preset in PRESETS:
            found = {row["how"]: row for row in recorded(preset, self._folder)}
            for claim in CLAIMS:
                key = (claim.test, preset)
                if key in self._failed:
                    found.pop(claim.test, None)
                elif key in self._passed:
                    found[claim.test] = _row(claim, self._passed[key])
            kept = [found[claim.test] for claim in CLAIMS if claim.test in found]
            if kept or (self._folder / f"{preset}.yaml").exists():
                self._folder.mkdir(exist_ok=True)
                text = yaml.safe_dump({"preset": preset, "verified": kept}, sort_keys=False)
                (self._folder / f"{preset}.yaml").write_text(f"{HEAD}{text}")


HEAD = "# Written by `pytest --record-verification` (tests/verification.py).\n"


def _row(claim: Claim, cases: int) -> dict[str, Any]:
    return {
        "what": claim.what,
        "how": claim.test,
        "cases": cases,
        "when": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "with": {
            "python": platform.python_version(),
            **{name: version(name) for name in VERSIONS},
        },
    }


def recorded(preset: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The entries of a preset, none where there is no file."""
    path = folder / f"{preset}.yaml"
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = yaml.safe_load(path.read_text())["verified"]
    return rows


def verification_page() -> str:
    """docs/verification.md."""
    tables = "\n".join(f"## {preset}\n{_table(preset)}\n" for preset in PRESETS)
    return f"""# What was verified

Of each preset: what, by which test, when, and with which versions. `docs/verification/PRESET.yaml`
are written by the tests themselves, with `bash tests/run.sh --all --record-verification` or a part
of it; `python -m tests.pages` prints this page. A claim is one line of `tests/verification.py`, and
counts the cases that have run; a case that fails takes it away. All of them ran on a CPU:
[no GPU has](gpus.md).

{tables}"""


def _table(preset: str) -> str:
    rows = "\n".join(
        f"| {row['what']} | `{row['how']}` | {row['cases']} | {row['when']} | {_versions(row)} |"
        for row in recorded(preset)
    )
    return f"| what | how | cases | when | with |\n|---|---|---|---|---|\n{rows}"


def _versions(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row["with"].items())
