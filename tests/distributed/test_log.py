"""What a run prints and writes is of the steps that it says, and evaluations can be compared."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_trinity.errors import TrinityError
from tests.distributed.pool import RankPools
from tests.trainer import logged, run_trainer, training_flags, write_dataset

Printed = dict[int, dict[str, float]]
VALIDATION = "lm loss validation"
FIELD = re.compile(r" ([^|:]+): +([-+.\dE]+) \|")


def lines(rank: int, world_size: int, flags: list[str]) -> Printed:
    """Iteration to the fields of Megatron's line, on the rank that prints it."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run_trainer(rank, world_size, flags) == 0
    found = {}
    for line in out.getvalue().splitlines():
        iteration = re.search(r"iteration +(\d+)/", line)
        if iteration:
            found[int(iteration[1])] = {name: float(v) for name, v in FIELD.findall(line)}
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data")
    return tmp_path / "data"


def run(ranks: RankPools, data: Path, name: str, *flags: str, world_size: int = 1) -> Printed:
    """Train with a TensorBoard directory of that name beside the data."""
    argv = training_flags(
        data,
        *("--optimizer", "adam", "--tensorboard-dir", str(data.parent / f"{name}-log")),
        *("--verbose-log", *flags),
    )
    return ranks.run(lines, argv, world_size=world_size)[-1]


def test_each_line_is_of_its_own_steps_after_every_start(ranks: RankPools, data: Path) -> None:
    save = ("--save", str(data.parent / "save"), "--save-interval", "2")
    whole = run(ranks, data, "whole", *save, "--train-iters", "4", "--log-throughput")
    load = ("--load", str(data.parent / "save"), "--ckpt-step", "2")
    resumed = run(ranks, data, "resumed", *load, "--train-iters", "4")
    losses = logged(data.parent / "whole-log", "lm loss")
    assert {i: line["lm loss"] for i, line in whole.items()} == pytest.approx(losses, rel=1e-6)
    assert {i: line["lm loss"] for i, line in resumed.items()} == pytest.approx(
        {i: losses[i] for i in (3, 4)}, rel=1e-6
    )
    speed = logged(data.parent / "whole-log", "tokens per second")
    for step, line in whole.items():
        tflops = line["throughput per GPU (TFLOP/s/GPU)"]
        assert 1e-6 < tflops < 10
        ratio = tflops / speed[step]
        assert ratio == pytest.approx(
            whole[1]["throughput per GPU (TFLOP/s/GPU)"] / speed[1], rel=1e-4
        )
    assert "throughput per GPU (TFLOP/s/GPU)" not in resumed[3]


def test_a_longer_interval_is_a_mean_of_all_its_steps(ranks: RankPools, data: Path) -> None:
    printed = run(ranks, data, "run", "--train-iters", "4", "--log-interval", "2")
    losses = logged(data.parent / "run-log", "lm loss")
    assert sorted(printed) == [1, 2, 4]
    expected = {1: losses[1], 2: (losses[1] + losses[2]) / 2, 4: (losses[3] + losses[4]) / 2}
    assert {i: line["lm loss"] for i, line in printed.items()} == pytest.approx(expected, rel=1e-6)


LOADERS: dict[str, tuple[int, list[str]]] = {
    "plain": (1, []),
    "a worker": (1, ["--num-workers", "1"]),
    "virtual stages": (
        2,
        [
            *("--pipeline-model-parallel-size", "2"),
            *("--num-layers-per-virtual-pipeline-stage", "1"),
        ],
    ),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_every_evaluation_sees_the_same_samples(ranks: RankPools, data: Path, loader: str) -> None:
    world_size, flags = LOADERS[loader]
    still = ("--lr", "0", "--adamw-lr", "0", "--lr-warmup-iters", "0", "--load-balancing", "none")
    often = ("--eval-iters", "2", "--eval-interval", "1", "--train-iters", "4")
    run(ranks, data, "still", *often, *still, *flags, world_size=world_size)
    values = logged(data.parent / "still-log", VALIDATION)
    assert sorted(values) == [1, 2, 3, 4]
    assert len(set(values.values())) == 1


@pytest.mark.slow
def test_how_often_a_run_evaluates_changes_no_value(ranks: RankPools, data: Path) -> None:
    save = ("--save", str(data.parent / "save"), "--save-interval", "2")
    often = ("--eval-interval", "1", "--train-iters", "4", "--eval-iters", "2")
    run(ranks, data, "often", *often, *save)
    seldom = ("--eval-interval", "4", "--train-iters", "4", "--eval-iters", "2")
    run(ranks, data, "seldom", *seldom)
    load = ("--load", str(data.parent / "save"), "--ckpt-step", "2")
    run(ranks, data, "resumed", *seldom, *load)
    expected = logged(data.parent / "often-log", VALIDATION)
    assert len(set(expected.values())) == 4
    for name in ("seldom", "resumed"):
        assert logged(data.parent / f"{name}-log", VALIDATION)[4] == expected[4]
    longer = (
        "--eval-interval",
        "2",
        "--train-iters",
        "6",
        "--eval-iters",
        "2",
        "--lr-decay-iters",
        "4",
    )
    run(ranks, data, "longer", *longer)
    assert logged(data.parent / "longer-log", VALIDATION)[2] == expected[2]


def test_data_parallel_ranks_evaluate_the_same_samples(ranks: RankPools, data: Path) -> None:
    flags = ("--eval-iters", "2", "--eval-interval", "2", "--train-iters", "4")
    for world_size in (1, 2):
        run(ranks, data, str(world_size), *flags, world_size=world_size)
    one, two = (logged(data.parent / f"{n}-log", VALIDATION) for n in (1, 2))
    assert two == pytest.approx(one, rel=1e-5)
    again = run(ranks, data, "again", *flags, "--eval-interval", "4", world_size=2)
    assert again
    assert logged(data.parent / "again-log", VALIDATION)[4] == two[4]


def refusal(rank: int, world_size: int, flags: list[str]) -> str:
    try:
        run_trainer(rank, world_size, flags)
    except TrinityError as error:
        return str(error)
    return ""


def write_single_tokens(prefix: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder: Any = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16, multimodal=False)
    for token in range(2000):
        builder.add_document(torch.tensor([token % 150]), [1])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_data_with_nothing_to_learn_is_one_line(
    ranks: RankPools, data: Path, world_size: int, split: str
) -> None:
    write_single_tokens(data.parent / "single")
    argv = training_flags(
        data,
        *("--dataloader-inter-document-masking", "--train-iters", "3", "--eval-interval", "1"),
        *(f"--{split}-data-path", str(data.parent / "single")),
    )
    words = {"train": "no token of this step carries a loss", "valid": "the lm loss of the evalu"}
    for line in ranks.run(refusal, argv, world_size=world_size):
        assert line.startswith(words[split])
        assert "\n" not in line
