"""A run of N steps, and one that is stopped at N/2 and resumed, end bitwise alike."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_trinity.arguments.parse import parse_arguments
from megatron_trinity.errors import UsageError
from megatron_trinity.training.resume import check_checkpoint
from megatron_trinity.upstream.checkpoint_tracker import TRACKER
from tests.crosses import first
from tests.distributed.pool import RankPools
from tests.trainer import checkpoint_contents, logged, run_trainer, training_flags, write_dataset

STEPS = 4
HALF = STEPS // 2
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "expert parallel": (2, ["--expert-model-parallel-size", "2"]),
    "distributed optimizer": (2, ["--use-distributed-optimizer"]),
    "tensor parallel": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pipeline parallel": (2, ["--pipeline-model-parallel-size", "2"]),
}
OPTIMIZERS = ["adam", "muon"]
PRECISIONS: dict[str, list[str]] = {"fp32": [], "bf16": ["--bf16"]}
# Every pair of an optimizer and a precision where state is split over ranks, two of them elsewhere.
SPLIT = itertools.product(("expert parallel", "distributed optimizer"), OPTIMIZERS, PRECISIONS)
CASES = [
    ("expert parallel", "muon", "bf16"),
    ("distributed optimizer", "adam", "bf16"),
    ("tensor parallel", "adam", "fp32"),
    ("pipeline parallel", "muon", "fp32"),
    ("tensor parallel", "muon", "bf16"),
    ("pipeline parallel", "adam", "bf16"),
]
CASES += [case for case in SPLIT if case not in CASES]
MOVES = [
    ("tensor parallel", "distributed optimizer", "adam", "bf16", "fp32"),
    ("distributed optimizer", "tensor parallel", "muon", "bf16", "fp32"),
    ("distributed optimizer", "tensor parallel", "adam", "fp32", "fp32"),
    ("pipeline parallel", "expert parallel", "adam", "fp32", "bf16"),
    ("expert parallel", "pipeline parallel", "muon", "fp32", "fp32"),
]


@pytest.mark.parametrize(("layout", "optimizer", "precision"), first(2, CASES))
def test_resume_is_exact(
    ranks: RankPools, tmp_path: Path, layout: str, optimizer: str, precision: str
) -> None:
    world_size, layout_flags = LAYOUTS[layout]
    write_dataset(tmp_path / "data")

    def train(name: str, *flags: str) -> None:
        argv = training_flags(
            tmp_path / "data",
            *layout_flags,
            *PRECISIONS[precision],
            *("--optimizer", optimizer, "--train-iters", str(STEPS)),
            *("--save", str(tmp_path / name), "--load", str(tmp_path / name)),
            *("--save-interval", str(HALF), "--tensorboard-dir", str(tmp_path / f"{name}-log")),
            *flags,
        )
        assert ranks.run(run_trainer, argv, world_size=world_size) == [0] * world_size

    train("whole")
    # As if the run had ended with its first save.
    saved = f"iter_{HALF:07d}"
    shutil.copytree(tmp_path / "whole" / saved, tmp_path / "halves" / saved)
    (tmp_path / "halves" / TRACKER).write_text(str(HALF))
    train("halves")

    whole = checkpoint_contents(tmp_path / "whole", STEPS)
    halves = checkpoint_contents(tmp_path / "halves", STEPS)
    assert whole.keys() == halves.keys()
    assert any("exp_avg" in key or "momentum" in key for key in whole), sorted(whole)
    differing = [key for key in whole if not torch.equal(whole[key], halves[key])]
    assert differing == []
    for tag in ("lm loss", "grad-norm", "learning-rate"):
        values = logged(tmp_path / "whole-log", tag)
        assert sorted(values) == list(range(1, STEPS + 1))
        later = {step: value for step, value in values.items() if step > HALF}
        assert logged(tmp_path / "halves-log", tag) == later
    for tag in ("tokens per second", "peak memory (GiB)"):
        assert all(value > 0 for value in logged(tmp_path / "whole-log", tag).values())
    half = checkpoint_contents(tmp_path / "halves", HALF)
    assert not torch.equal(half["output_layer.weight"], whole["output_layer.weight"])


OTHER_MODELS = {
    "--sliding-window": "64",
    "--global-attn-every-n-layers": "2",
    "--moe-router-topk": "4",
    "--moe-router-topk-scaling-factor": "3.0",
    "--rotary-base": "500000",
    "--norm-epsilon": "0.01",
    "--num-experts": "4",
}


def refusals(rank: int, world_size: int, starts: Sequence[Sequence[str]]) -> list[str]:
    """What each start is refused with before anything is built; empty if it is not."""
    told = []
    for flags in starts:
        try:
            check_checkpoint(parse_arguments(flags))
            told.append("")
        except UsageError as error:
            told.append(str(error))
    return told


def test_another_model_or_length_is_not_resumed(ranks: RankPools, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    run = ("--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"))
    flags = (*run, "--save-interval", "1", "--optimizer", "adam", "--train-iters")
    argv = training_flags(tmp_path / "data", *flags, "3", "--lr-warmup-iters", "0")
    assert ranks.run(run_trainer, [*argv, "--exit-interval", "1"], world_size=1) == [0]
    longer = ("--seq-length", "64")
    starts = [[*argv, flag, value] for flag, value in OTHER_MODELS.items()]
    starts += [[*argv, "--no-mup-enabled"], [*argv, "--finetune", "--rotary-base", "500000"]]
    starts += [[*argv, *longer], [*argv, *longer, "--extend-context"], argv]
    *others, length, extended, same = ranks.run(refusals, starts, world_size=1)[0]
    for told, flag in zip(others, [*OTHER_MODELS, "--mup-enabled", "--rotary-base"], strict=True):
        assert "is of another model" in told
        assert f"{flag} is " in told
    assert "--seq-length is 32 there and 64 here" in length
    assert "--extend-context" in length
    assert (extended, same) == ("", "")


@pytest.mark.parametrize(("source", "target", "optimizer", "before", "after"), first(0, MOVES))
def test_resume_elsewhere(
    ranks: RankPools,
    tmp_path: Path,
    source: str,
    target: str,
    optimizer: str,
    before: str,
    after: str,
) -> None:
    """In another layout, sharding and precision, the trainer goes on as it would have."""
    write_dataset(tmp_path / "data")

    def train(name: str, layout: str, precision: str, steps: int, load: str) -> None:
        world_size, layout_flags = LAYOUTS[layout]
        argv = training_flags(
            tmp_path / "data",
            *layout_flags,
            *PRECISIONS[precision],
            *("--optimizer", optimizer, "--train-iters", str(STEPS), "--adam-eps", "1e-3"),
            *("--save", str(tmp_path / name), "--load", str(tmp_path / load)),
            *("--save-interval", "1", "--tensorboard-dir", str(tmp_path / f"{name}-log")),
            *("--exit-interval", str(steps)),
        )
        assert ranks.run(run_trainer, argv, world_size=world_size) == [0] * world_size

    train("there", source, before, HALF, "there")
    train("here", target, after, HALF + 1, "there")
    train("there", source, before, HALF + 1, "there")
    there, here = (checkpoint_contents(tmp_path / name, HALF + 1) for name in ("there", "here"))
    assert there.keys() == here.keys()
    assert sorted(logged(tmp_path / "here-log", "lm loss")) == [HALF + 1]
    # Of gradients, rounded to bf16 on one side; without their past, moments would differ by 0.8.
    rounded = "bf16" in (before, after)
    tolerance = 0.3 if rounded else 1e-4
    for key, tensor in there.items():
        if rounded and "expert_bias" in key:
            continue  # it follows counts of tokens, of which some are routed elsewhere
        difference = (here[key].float() - tensor.float()).norm()
        assert difference <= tolerance * tensor.float().norm(), key
    for tag in ("lm loss", "grad-norm"):
        logs = [logged(tmp_path / f"{name}-log", tag)[HALF + 1] for name in ("there", "here")]
        assert logs[1] == pytest.approx(logs[0], rel=tolerance), tag
