"""The figures of the balancing benchmark, made up instead of trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import balancing
from megatron_trinity.errors import TrinityError, UsageError

STEPS = 100


def scalars(violation: float, entropy: float = 2.0) -> balancing.Scalars:
    """A log whose last `TAIL` steps have these means, and whose steps before are far off."""
    steps = range(1, STEPS + 1)
    late = {step: step > STEPS - balancing.TAIL for step in steps}
    wiggle = {step: 0.1 if step % 2 else -0.1 for step in steps}
    curve = {step: violation + wiggle[step] if late[step] else 99.0 for step in steps}
    return {
        "max violation": curve,
        "max violation/layer 02": curve,
        "max violation/layer 03": {step: value / 2 for step, value in curve.items()},
        "load entropy": dict.fromkeys(steps, entropy),
        "lm loss": dict.fromkeys(steps, 4.0),
        "lm loss validation": {STEPS: 3.5},
    }


def outcomes(none: float, sign: float, smebu: float) -> dict[str, balancing.Outcome]:
    violations = {"none": none, "sign": sign, "smebu": smebu}
    return {rule: balancing.Outcome.of(scalars(value)) for rule, value in violations.items()}


def test_figures_are_means_of_the_last_steps() -> None:
    outcome = balancing.Outcome.of(scalars(0.6))
    assert outcome.max_violation == pytest.approx(0.6)
    assert outcome.by_layer == pytest.approx({"layer 02": 0.6, "layer 03": 0.3})
    assert outcome.validation_loss == 3.5


def test_a_ratio_above_one_is_in_favour_of_ours() -> None:
    found = outcomes(none=2.4, sign=0.6, smebu=0.3)
    found["smebu"] = replace(found["smebu"], entropy=2.05)
    rows = {row["case"]: row for row in balancing.rows(found)}
    assert rows["max violation: SMEBU against no balancing"]["ratio"] == pytest.approx(8)
    assert rows["max violation: sign rule against no balancing"]["ratio"] == pytest.approx(4)
    assert rows["load entropy: SMEBU against sign rule"]["ratio"] == pytest.approx(2.05 / 2)


def test_a_rule_that_does_not_balance_fails_by_its_figures() -> None:
    balancing.check_balanced(outcomes(none=2.4, sign=0.7, smebu=0.79))
    with pytest.raises(TrinityError, match=r"\(2\.400\): SMEBU ends at 0\.810$"):
        balancing.check_balanced(outcomes(none=2.4, sign=0.7, smebu=0.81))


def test_runs_that_do_not_start_alike_are_not_compared() -> None:
    with pytest.raises(TrinityError, match="load entropy of step 1"):
        balancing.check_same_start({"none": scalars(2.0), "sign": scalars(2.0, entropy=1.9)})


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no data\.json; run `bash examples/quickstart\.sh`"):
        balancing.validation_batches(tmp_path)


def test_the_same_figures_draw_the_same_file(tmp_path: Path) -> None:
    runs = {rule: scalars(1.0) for rule in balancing.RULES}
    figures = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for figure in figures:
        balancing.draw(runs, figure)
    assert figures[0].read_bytes() == figures[1].read_bytes()
    assert "no balancing" in figures[0].read_text()
