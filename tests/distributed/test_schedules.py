"""Training counted in tokens: its length, its rates, and a batch that grows at a token count."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.distributed.pool import RankPools
from tests.trainer import SEQUENCE, logged, run_trainer, training_flags, write_dataset

SAMPLES, RAMP = 48, 16
# Weights and biases that stay: a loss tells its samples.
FIXED = ("--lr", "1e-12", "--adamw-lr", "1e-12", "--load-balancing", "none")


def train(ranks: RankPools, tmp_path: Path, name: str, *flags: str) -> dict[str, dict[int, float]]:
    data = tmp_path / "data"
    if not data.with_suffix(".idx").exists():
        write_dataset(data)
    argv = training_flags(
        data,
        *("--optimizer", "muon", "--train-tokens", str(SAMPLES * SEQUENCE)),
        *("--lr-warmup-iters", "0", "--tensorboard-dir", str(tmp_path / name), *flags),
    )
    assert ranks.run(run_trainer, argv, world_size=2) == [0, 0]
    tags = ("lm loss", "learning-rate", "adamw learning rate", "batch-size")
    return {tag: logged(tmp_path / name, tag) for tag in tags}


def test_a_growing_batch_goes_on_where_the_smaller_one_was(
    ranks: RankPools, tmp_path: Path
) -> None:
    small = train(ranks, tmp_path, "small", "--global-batch-size", "4", *FIXED)
    ramp = f"0:4 {RAMP * SEQUENCE}:8"
    grown = train(ranks, tmp_path, "grown", "--step-batch-size-schedule", ramp, *FIXED)
    assert len(small["lm loss"]) == SAMPLES // 4
    before = RAMP // 4
    steps = range(1, before + (SAMPLES - RAMP) // 8 + 1)
    assert list(grown["lm loss"]) == list(steps)
    for step in steps:
        first = step if step <= before else before + 1 + 2 * (step - before - 1)
        of_step = [first] if step <= before else [first, first + 1]
        expected = sum(small["lm loss"][number] for number in of_step) / len(of_step)
        assert grown["lm loss"][step] == pytest.approx(expected, rel=1e-5), step
    losses = list(small["lm loss"].values())
    assert min(abs(a - b) for a, b in pairwise(losses)) > 1e-4


def test_rates_follow_the_tokens(ranks: RankPools, tmp_path: Path) -> None:
    got = train(
        ranks,
        tmp_path,
        "rates",
        *("--global-batch-size", "4", "--lr", "1e-3", "--adamw-lr", "4e-4", "--min-lr", "1e-4"),
        *("--lr-warmup-tokens", str(8 * SEQUENCE), "--lr-decay-style", "WSD"),
        *("--lr-wsd-decay-tokens", str(16 * SEQUENCE), "--lr-wsd-decay-style", "linear"),
    )
    assert list(got["learning-rate"]) == list(range(1, 13))
    for step in range(1, 13):
        seen = 4 * step  # sequences; a step's line has the rate of the next one
        rest = min(1.0, (SAMPLES - seen) / 16)
        muon = 1e-3 * seen / 8 if seen <= 8 else 1e-4 + 9e-4 * rest
        adamw = 4e-4 * seen / 8 if seen <= 8 else 4e-4 * rest
        assert got["learning-rate"][step] == pytest.approx(muon, rel=1e-5), step
        assert got["adamw learning rate"][step] == pytest.approx(adamw, rel=1e-5), step
