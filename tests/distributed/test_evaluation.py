"""Runs with and without validation data: the one evaluates, the other does not, and both end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.pool import RankPools
from tests.trainer import run_trainer, training_flags, write_dataset

VIRTUAL = ("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1")


def evaluated(directory: Path) -> list[int]:
    """The steps after which a run has evaluated."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    tag = "lm loss validation"
    return [e.step for e in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


@pytest.mark.parametrize(("world_size", "layout"), [(1, ()), (2, VIRTUAL)])
def test_evaluation_needs_validation_data(
    ranks: RankPools, tmp_path: Path, world_size: int, layout: tuple[str, ...]
) -> None:
    data = tmp_path / "data"
    write_dataset(data)
    flags = training_flags(data, "--train-iters", "4", "--eval-interval", "2", *layout)
    place = flags.index("--valid-data-path")
    without = [*flags[:place], *flags[place + 2 :]]
    place = without.index("--train-data-path")
    split = [
        *without[:place],
        "--data-path",
        str(data),
        "--split",
        "100,0,0",
        *without[place + 2 :],
    ]
    runs = {"with": flags, "without": without, "split": split}
    for name, words in runs.items():
        words = [*words, "--tensorboard-dir", str(tmp_path / name)]
        assert ranks.run(run_trainer, words, world_size=world_size) == [0] * world_size
    found = {name: evaluated(tmp_path / name) for name in runs}
    assert found == {"with": [2, 4, 4], "without": [], "split": []}
