"""What a run leaves of itself: its events, its arguments, and the lines it prints."""

from __future__ import annotations

import contextlib
import fnmatch
import io
import re
from pathlib import Path

import pytest
import yaml

from megatron_trinity.reporting.console import WIDTH
from megatron_trinity.reporting.history import read_history
from megatron_trinity.reporting.names import NAMES
from megatron_trinity.reporting.schema import KINDS
from tests.distributed.pool import RankPools
from tests.trainer import logged, run_trainer, training_flags, write_dataset

STEPS = 6


def printing(rank: int, world_size: int, flags: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run_trainer(rank, world_size, flags) == 0
    return out.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data")
    return tmp_path / "data"


def flags_of(data: Path, run: Path, *flags: str) -> list[str]:
    return training_flags(
        data,
        *("--optimizer", "muon", "--seq-aux-loss-coeff", "0.01", "--z-loss-coeff", "1e-4"),
        *("--save", str(run), "--load", str(run), "--save-interval", "2"),
        *("--tensorboard-dir", str(run / "log"), "--eval-interval", "3"),
        *("--train-iters", str(STEPS), *flags),
    )


def test_a_run_with_a_lost_step_is_told_once(ranks: RankPools, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped = flags_of(data, run, "--exit-interval", "3", "--save-interval", "2")
    [first, last] = ranks.run(printing, stopped, world_size=2)
    # What was done behind the second step is lost with its checkpoint.
    for path in run.glob("iter_0000003*"):
        path.rename(tmp_path / "elsewhere")
    (run / "latest_checkpointed_iteration.txt").write_text("2")
    ranks.run(printing, flags_of(data, run), world_size=2)

    found = read_history(run)
    assert [event["iteration"] for event in found.starts] == [0, 2]
    assert [event["iteration"] for event in found.steps] == [*range(1, STEPS + 1)]
    assert [event["iteration"] for event in found.saves] == [2, 4, 6]
    assert [event["iteration"] for event in found.evaluations] == [3, 6]
    lost = {(event["kind"], event["iteration"]) for event in found.lost}
    assert lost >= {("step", 3), ("evaluation", 3), ("save", 3)}
    assert [event["code"] for event in found.ends] == [0, 0]
    assert (found.missing, found.unread) == (0, 0)
    everything = (
        *(*found.starts, *found.steps, *found.loads, *found.data),
        *(*found.evaluations, *found.saves, *found.ends),
    )
    for event in everything:
        assert set(event) == {"kind", "time", *KINDS[event["kind"]].fields}, event["kind"]

    # The values are TensorBoard's, and every name is in the table.
    tags = ("lm loss", "grad-norm", "learning-rate", "adamw learning rate", "max violation")
    for tag in tags:
        written = {event["iteration"]: event["values"][tag] for event in found.steps}
        assert written == pytest.approx(logged(run / "log", tag), rel=1e-6), tag
    described = [re.sub(r"\{[^}]*\}", "*", one.name) for one in NAMES]
    for event in (*found.steps, *found.evaluations):
        known = ("lm loss validation", "perplexity") if event["kind"] == "evaluation" else ()
        for name in set(event["values"]) - set(known):
            assert any(fnmatch.fnmatch(name, one) for one in described), name
    worst = [max(event["max violation"]) for event in found.steps]
    assert worst == pytest.approx([e["values"]["max violation"] for e in found.steps], rel=1e-3)
    for event in found.loads:
        layers = len(found.starts[0]["layers"])
        assert len(event["counts"]) == len(event["bias"]) == layers
        assert {sum(row) for row in event["counts"]} == {8 * 32 * 2}  # tokens times top-k

    # Rank 0 prints the table, the last rank the rest.
    assert [line.split()[0] for line in first.splitlines() if re.match(r"  \w", line)][:3] == [
        *("model", "parameters", "layout")
    ]
    lines = last.splitlines()
    assert max(map(len, lines)) <= WIDTH + len(str(tmp_path))
    assert [line.split()[0] for line in lines if re.match(r" +\d+/6 ", line)] == [
        *("1/6", "2/6", "3/6")
    ]
    assert [line.split()[1] for line in lines if line.startswith(" --")] == [
        *("saved", "validation", "saved", "trained")
    ]
    assert "consumed samples" not in first + last


def test_the_arguments_of_a_run_give_it_again(ranks: RankPools, data: Path, tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    ranks.run(printing, flags_of(data, run, "--lr-wsd-decay-iters", "3"), world_size=1)
    preset = str(run / "arguments.yaml")
    words = ["--preset", preset, "--save", str(again), "--load", str(again)]
    ranks.run(printing, [*words, "--tensorboard-dir", str(again / "log")], world_size=1)
    both = [
        [(e["values"]["lm loss"], e["values"]["grad-norm"]) for e in read_history(path).steps]
        for path in (run, again)
    ]
    assert len(both[0]) == STEPS
    assert both[0] == both[1]
    first, second = (yaml.safe_load((path / "arguments.yaml").read_text()) for path in (run, again))
    differing = {
        key for key in first["megatron"] if first["megatron"][key] != second["megatron"][key]
    }
    assert differing == {"save", "load", "tensorboard-dir"}
    assert first["trinity"] == second["trinity"]


def test_a_run_without_a_folder_leaves_nothing(ranks: RankPools, data: Path) -> None:
    flags = training_flags(data, "--optimizer", "adam", "--train-iters", "3")
    before = sorted(data.parent.rglob("*"))
    [printed] = ranks.run(printing, flags, world_size=1)
    new = {path.name for path in data.parent.rglob("*")} - {path.name for path in before}
    assert not new & {"events.jsonl", "arguments.yaml"}
    assert " 3/3 100.0%" in printed


def test_megatrons_own_output(ranks: RankPools, data: Path) -> None:
    flags = training_flags(
        data, "--optimizer", "adam", "--train-iters", "3", "--verbose-log", "--log-throughput"
    )
    [printed] = ranks.run(printing, flags, world_size=1)
    assert "- end of arguments -" in printed
    assert len(re.findall(r"iteration +\d/ +3 \| consumed samples", printed)) == 3
    assert len(re.findall(r"^ balance +\d ", printed, re.MULTILINE)) == 3
    assert " 3/3 " not in printed
    assert not printed.startswith("Trinity")
