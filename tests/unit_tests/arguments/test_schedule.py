"""Schedules in tokens become Megatron's in samples; rates over time are what they should be."""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_trinity.arguments.schedule import derive_schedule, token_count
from megatron_trinity.arguments.stages import stage_notes
from megatron_trinity.errors import UsageError
from megatron_trinity.upstream.optimizer_factory import set_schedule_start
from tests.distributed.pool import RankPools


@pytest.mark.parametrize(
    ("text", "count"),
    [("134217728", 134217728), ("4.9T", 4_900_000_000_000), ("500m", 500_000_000), ("2K", 2000)],
)
def test_numbers_of_tokens(text: str, count: int) -> None:
    assert token_count(text) == count


@pytest.mark.parametrize("text", ["", "T", "many", "-5", "0", "nan", "inf", "1e999", "5X"])
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no number of tokens"):
        token_count(text)


def arguments(**changes: Any) -> Namespace:
    values = {
        "train_iters": None,
        "train_samples": None,
        "train_tokens": None,
        "lr_decay_tokens": None,
        "lr_decay_samples": None,
        "lr_decay_iters": None,
        "lr_warmup_tokens": None,
        "lr_warmup_samples": 0,
        "lr_warmup_iters": 0,
        "lr_wsd_decay_tokens": None,
        "lr_wsd_decay_samples": None,
        "lr_wsd_decay_iters": None,
        "lr_decay_style": "WSD",
        "lr_warmup_fraction": None,
        "skip_train": False,
        "lr_restart_tokens": None,
        "lr_restart_iters": None,
        "seq_length": 4096,
        "global_batch_size": 8,
        "step_batch_size_schedule": None,
    }
    args = Namespace(**(values | changes))
    derive_schedule(args)
    return args


def test_tokens_become_samples() -> None:
    args = arguments(
        train_tokens=4096 * 1000, lr_warmup_tokens=4096 * 50, lr_wsd_decay_tokens=4096 * 200 + 7
    )
    assert (args.train_samples, args.lr_decay_samples) == (1000, 1000)
    assert (args.lr_warmup_samples, args.lr_wsd_decay_samples) == (50, 200)
    assert (args.lr_warmup_iters, args.lr_restart_samples) == (0, 0)


def test_stages_of_a_preset_in_iterations_keep_their_length() -> None:
    args = arguments(train_tokens=4096 * 10**6, lr_warmup_iters=2000, lr_wsd_decay_iters=500)
    assert (args.lr_warmup_samples, args.lr_wsd_decay_samples) == (16000, 4000)
    assert (args.lr_warmup_iters, args.lr_wsd_decay_iters) == (0, None)


def test_a_ramp_takes_the_place_of_the_batch_size() -> None:
    args = arguments(
        train_tokens=4096 * 10**6, lr_warmup_iters=10, step_batch_size_schedule="0:4 4096K:16"
    )
    assert args.global_batch_size is None
    assert args.lr_warmup_samples == 40


def test_a_restart_in_tokens_and_in_iterations() -> None:
    args = arguments(train_tokens=4096 * 1000, lr_restart_tokens=4096 * 600)
    assert (args.lr_restart_samples, args.lr_decay_samples) == (600, 400)
    args = arguments(train_iters=100, lr_restart_iters=60)
    assert (args.lr_restart_samples, args.lr_decay_iters) == (480, 40)
    assert arguments(train_iters=100).lr_restart_samples == 0


@pytest.mark.parametrize(
    ("changes", "unit", "end", "decay"),
    [
        ({"train_iters": 200}, "iters", 200, 40),
        ({"train_iters": 200, "lr_warmup_iters": 20, "lr_wsd_decay_iters": 90}, "iters", 200, 90),
        ({"train_iters": 200, "lr_decay_iters": 100}, "iters", 100, 20),
        ({"train_iters": 200, "lr_warmup_iters": 190}, "iters", 200, 10),
        ({"train_iters": 200, "lr_warmup_fraction": 0.95}, "iters", 200, 10),
        ({"train_iters": 200, "lr_restart_iters": 50}, "iters", 150, 30),
        ({"train_iters": 1}, "iters", 1, 1),
        ({"train_iters": 200, "lr_decay_style": "linear"}, "iters", 200, None),
        ({"train_samples": 1000}, "samples", 1000, 200),
        ({"train_tokens": 4096 * 1000}, "samples", 1000, 200),
        ({"train_tokens": 4096 * 1000, "lr_restart_tokens": 4096 * 500}, "samples", 500, 100),
    ],
)
def test_the_last_stage_is_a_fifth_of_the_schedule(
    changes: dict[str, Any], unit: str, end: int, decay: int | None
) -> None:
    args = arguments(**changes)
    found = getattr(args, f"lr_decay_{unit}"), getattr(args, f"lr_wsd_decay_{unit}")
    assert found == (end, decay)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train_iters": 200}, []),
        ({"train_iters": 200, "lr_wsd_decay_iters": 200}, []),
        (
            {"train_iters": 200, "lr_warmup_iters": 20, "lr_wsd_decay_iters": 500},
            ["takes 500 iterations, the schedule leaves 180"],
        ),
        (
            {"train_iters": 200, "lr_decay_iters": 300},
            ["ends after 300 iterations, the run after 200"],
        ),
        ({"train_iters": 200, "lr_decay_iters": 150, "lr_restart_iters": 50}, []),
        (
            {"train_tokens": 4096 * 1000, "lr_wsd_decay_tokens": 4096 * 2000},
            ["takes 2000 samples, the schedule leaves 1000"],
        ),
    ],
)
def test_stages_longer_than_the_run_are_said(changes: dict[str, Any], says: list[str]) -> None:
    notes = list(stage_notes(arguments(**changes)))
    assert len(notes) == len(says)
    assert all(words in note for words, note in zip(says, notes, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_tokens": 10**6, "train_iters": 5}, "--train-tokens beside --train-iters"),
        ({"train_tokens": 10**6, "train_samples": 5}, "--train-tokens beside --train-iters"),
        ({"train_tokens": 10**6, "seq_length": None}, "--train-tokens needs --seq-length"),
        ({"train_iters": 5, "lr_warmup_tokens": 9}, "--lr-warmup-tokens needs --train-tokens"),
        (
            {"train_iters": 5, "step_batch_size_schedule": "0:4"},
            "--step-batch-size-schedule beside --train-iters",
        ),
        ({"lr_restart_iters": 5}, "--lr-restart-iters needs --train-iters"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        arguments(**changes)


def rates(
    rank: int, world_size: int, style: str, wsd_style: str, steps: list[int], start: int
) -> list[tuple[float, float]]:
    """Muon's and AdamW's rate after so many samples: warm-up 10, decay over the last 40 of 100."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    muon = {"max_lr": 8e-4, "min_lr": 8e-5}
    adamw = {"max_lr": 2e-4, "min_lr": 0.0}
    optimizer: Any = SimpleNamespace(param_groups=[muon, adamw])
    set_schedule_start(start)
    try:
        scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=8e-4,
            min_lr=8e-5,
            lr_warmup_steps=10,
            lr_decay_steps=100,
            lr_decay_style=style,
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=100,
            wd_incr_style="constant",
            wsd_decay_steps=40,
            lr_wsd_decay_style=wsd_style,
        )
        found = []
        for step in steps:
            scheduler.step(step - scheduler.num_steps)
            found.append((float(muon["lr"]), float(adamw["lr"])))
            assert scheduler.num_steps == step  # what a checkpoint holds does not shift
        return found
    finally:
        set_schedule_start(0)


def test_warm_up_stable_then_linear_or_cosine(ranks: RankPools) -> None:
    steps = [0, 5, 10, 60, 70, 80, 100, 120]
    [linear] = ranks.run(rates, "WSD", "linear", steps, 0, world_size=1)
    share = [0.0, 0.5, 1.0, 1.0, 0.75, 0.5, 0.0, 0.0]  # of the way from minimum to peak
    assert [a for _, a in linear] == pytest.approx([2e-4 * s for s in share])
    muon = [8e-4 * s for s in share[:3]] + [8e-5 + 7.2e-4 * s for s in share[3:]]
    assert [m for m, _ in linear] == pytest.approx(muon)
    [cosine] = ranks.run(rates, "WSD", "cosine", steps, 0, world_size=1)
    share = [0.0, 0.5, 1.0, 1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, 0.0, 0.0]
    assert [a for _, a in cosine] == pytest.approx([2e-4 * s for s in share])


def test_a_schedule_that_starts_anew(ranks: RankPools) -> None:
    steps = [0, 5, 10, 60, 70, 80, 100, 120]
    [plain] = ranks.run(rates, "linear", "linear", steps, 0, world_size=1)
    [shifted] = ranks.run(rates, "linear", "linear", [s + 1000 for s in steps], 1000, world_size=1)
    assert shifted == plain
