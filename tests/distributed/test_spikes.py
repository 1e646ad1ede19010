"""A spike is told, left out, or gone back from; the same in a run that was stopped before it."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_trinity import exits
from megatron_trinity.errors import StepError
from tests.broken_runs import POINTER, flags_of, train
from tests.crosses import first
from tests.distributed.pool import RankPools
from tests.faults import Fault, train_with
from tests.steps import recorded
from tests.trainer import write_dataset

SPIKE = Fault("spike", (3,))
FLAGS = ("--spike-factor", "10", "--spike-window", "4")


def judged(values: Sequence[float], **options: object) -> list[str | None]:
    """What is said of each loss of a run, where every spike is left out."""
    from megatron_trinity.training import spikes

    said: list[str] = []
    args = Namespace(spike_factor=2.0, spike_window=4, spike_action="skip", spike_skips=2)
    vars(args).update(options)
    watching = spikes.Spikes(args)
    results: list[str | None] = []
    before, spikes.print_rank_last = spikes.print_rank_last, said.append
    try:
        for number, value in enumerate(values, 1):
            applied = value <= watching.limit("lm loss")
            said.clear()
            watching.ends(number, {"lm loss": value}, applied)
            results.append(said[0] if said else None)
    finally:
        spikes.print_rank_last = before
    return results


def test_a_spike_is_above_the_median_of_those_before_it() -> None:
    line = (
        "WARNING: iteration {} is a spike: the lm loss is {}, above {}; left out, {} of 2 in a row"
    )
    assert judged([9.0, 1.0, 10.0, 11.0, 3.0, 9.0]) == [None] * 6
    assert judged([1.0, 1.2, 3.0, 2.0, 5.0, 1.0]) == [
        *(None, None),
        line.format(3, 3, 2.2, 1),
        None,
        line.format(5, 5, 2.4, 1),
        None,
    ]
    with pytest.raises(StepError, match="more than --spike-skips 2 in a row"):
        judged([1.0, 1.0, 3.0, 3.0, 3.0])


@pytest.mark.parametrize(
    ("world_size", "flags"),
    first(
        1,
        [
            (1, ("--optimizer", "muon")),
            (1, ()),
            (2, ("--pipeline-model-parallel-size", "2")),
            (2, ("--use-distributed-optimizer",)),
        ],
    ),
)
def test_a_spike_is_left_out(
    ranks: RankPools, tmp_path: Path, world_size: int, flags: tuple[str, ...]
) -> None:
    write_dataset(tmp_path / "data")
    words = (*FLAGS, "--spike-action", "skip", *flags)
    whole = flags_of(tmp_path, tmp_path / "whole", *words)
    outcome = ranks.run(train_with, whole, SPIKE, tmp_path / "steps", world_size=world_size)[-1]
    assert outcome[:2] == (0, "")
    assert "WARNING: iteration 3 is a spike: the gradient norm is " in outcome[2]
    assert "left out, 1 of 3 in a row" in outcome[2]
    run = flags_of(tmp_path, tmp_path / "run", *words)
    stopped = [*run, "--exit-interval", "2"]
    assert ranks.run(train, stopped, tmp_path / "halves", world_size=world_size)[0][0] == 0
    assert ranks.run(train_with, run, SPIKE, tmp_path / "halves", world_size=world_size)[0][0] == 0
    assert recorded(tmp_path / "halves") == recorded(tmp_path / "steps")


@pytest.mark.parametrize(
    ("world_size", "flags"),
    first(
        1,
        [
            (2, ("--pipeline-model-parallel-size", "2", "--optimizer", "muon")),
            (1, ()),
            (2, ("--use-distributed-optimizer",)),
            (2, ("--context-parallel-size", "2")),
            (2, ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
        ],
    ),
)
def test_a_step_is_left_out_for_its_loss(
    ranks: RankPools, tmp_path: Path, world_size: int, flags: tuple[str, ...]
) -> None:
    """Its gradients are as they always were, and nothing of the step is applied on any rank."""
    write_dataset(tmp_path / "data")
    # A factor that the norms of a run so short stay below.
    words = ("--spike-factor", "5", "--spike-window", "4", "--spike-action", "skip", *flags)
    run = flags_of(tmp_path, tmp_path / "run", *words)
    high = Fault("high", (3,), rank=world_size - 1)
    outcomes = ranks.run(train_with, run, high, tmp_path / "steps", world_size=world_size)
    assert [outcome[:2] for outcome in outcomes] == [(0, "")] * world_size
    [line] = [line for line in outcomes[-1][2].splitlines() if "is a spike" in line]
    assert line.startswith("WARNING: iteration 3 is a spike: the lm loss is ")
    assert line.endswith("left out, 1 of 3 in a row")
    assert "gradient norm" not in line
    without = flags_of(tmp_path, tmp_path / "without", "--iterations-to-skip", "3", *words)
    assert ranks.run(train, without, tmp_path / "others", world_size=world_size)[-1][0] == 0
    steps, others = recorded(tmp_path / "steps"), recorded(tmp_path / "others")
    assert [number for number, _ in steps] == [1, 2, 3, 4]
    assert [step for step in steps if step[0] != 3] == others


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--async-save",)])
def test_the_next_start_leaves_out_what_led_to_a_spike(
    ranks: RankPools, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    write_dataset(tmp_path / "data")
    without = flags_of(tmp_path, tmp_path / "whole", "--iterations-to-skip", "3")
    assert ranks.run(train, without, tmp_path / "steps", world_size=1)[0][0] == 0
    run = flags_of(tmp_path, tmp_path / "run", *FLAGS, "--spike-action", "rewind", *flags)
    code, error, _ = ranks.run(train_with, run, SPIKE, tmp_path / "halves", world_size=1)[0]
    assert code == exits.REWIND
    assert error.startswith("iteration 3 is a spike: the gradient norm is ")
    assert (tmp_path / "run" / POINTER).read_text() == "2"
    left_out = json.loads((tmp_path / "run" / "skipped_steps.json").read_text())
    assert left_out[-1] == 3  # and 2 where its save was not yet finished
    assert ranks.run(train, run, tmp_path / "halves", world_size=1)[0][0] == 0
    steps = recorded(tmp_path / "steps")
    assert [number for number, _ in steps] == [1, 2, 4]
    assert recorded(tmp_path / "halves") == steps
