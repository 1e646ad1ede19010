"""A step that is not finite is neither applied nor saved, and the next start goes on bitwise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megatron_trinity.checkpoint.inspect import inspect_checkpoint
from tests.broken_runs import NEWEST, POINTER, flags_of, listing, train, warnings_of
from tests.crosses import first, slow
from tests.distributed.pool import RankPools
from tests.faults import Fault, train_with
from tests.steps import recorded
from tests.trainer import checkpoint_contents, events_of, write_dataset

REMEDY = (
    "; it is not applied, and no checkpoint has it: start again with a lower --lr, or with "
    "--skip-nonfinite-steps to leave such steps out"
)
ELSEWHERE = REMEDY.replace("with a lower --lr", "on other hardware")
# Steps of 8 samples: the third begins at sample 16. Micro-batches of 2.
ATTENTION = "iteration 3 is not finite: the attention of layer 2 first, on rank {rank}, in samples "
CASES: list[tuple[str, int, tuple[str, ...], Fault, str]] = [
    (
        "forward",
        2,
        ("--optimizer", "muon"),
        Fault("attention", (3,), rank=1),
        ATTENTION.format(rank=1) + "18 to 19",
    ),
    (
        "backward",
        1,
        (),
        Fault("gradient", (3,)),
        "iteration 3 is not finite: the gradient of layer 3's mlp.router.weight first, on rank 0, "
        "in samples 16 to 23",
    ),
    (
        "loss alone",
        1,
        ("--bf16",),
        Fault("loss", (3,)),
        "iteration 3 is not finite: the loss first, on rank 0, in samples 16 to 17",
    ),
    (
        "rerun machine off",
        1,
        ("--rerun-mode", "disabled"),
        Fault("attention", (3,)),
        "iteration 3 is not finite: the gradient of output_layer.weight first, on rank 0, in "
        "samples 16 to 23",
    ),
    (
        "in the background",
        1,
        ("--async-save",),
        Fault("attention", (3,)),
        ATTENTION.format(rank=0) + "16 to 17",
    ),
    (
        "pipeline, Muon in bf16",
        2,
        ("--pipeline-model-parallel-size", "2", "--optimizer", "muon", "--bf16"),
        Fault("attention", (3,), rank=0),
        ATTENTION.format(rank=0) + "16 to 17",
    ),
    (
        "sharded Adam in bf16",
        2,
        ("--use-distributed-optimizer", "--bf16"),
        Fault("attention", (3,), rank=1),
        ATTENTION.format(rank=1) + "18 to 19",
    ),
    (
        "loss with a scale",
        1,
        ("--fp16", "--initial-loss-scale", "1"),
        Fault("loss", (3,)),
        "iteration 3 is not finite: the gradient of output_layer.weight first, on rank 0, in "
        "samples 16 to 23",
    ),
]


@pytest.mark.parametrize(("name", "world_size", "flags", "fault", "line"), first(3, CASES))
def test_the_run_ends_and_the_next_start_goes_on(
    ranks: RankPools,
    tmp_path: Path,
    name: str,
    world_size: int,
    flags: tuple[str, ...],
    fault: Fault,
    line: str,
) -> None:
    write_dataset(tmp_path / "data")
    whole = flags_of(tmp_path, tmp_path / "whole", *flags)
    assert ranks.run(train, whole, tmp_path / "steps", world_size=world_size)[0][0] == 0
    run = flags_of(tmp_path, tmp_path / "run", *flags)
    outcomes = ranks.run(train_with, run, fault, tmp_path / "halves", world_size=world_size)
    assert [outcome[:2] for outcome in outcomes] == [(3, line + REMEDY)] * world_size
    assert (tmp_path / "run" / POINTER).read_text() == "2"
    assert not (tmp_path / "run" / NEWEST).exists()
    assert ranks.run(train, run, tmp_path / "halves", world_size=world_size)[0][0] == 0
    assert recorded(tmp_path / "halves") == recorded(tmp_path / "steps")


@pytest.mark.parametrize("optimizer", ["adam", slow("muon")])
def test_the_first_step_after_a_start(ranks: RankPools, tmp_path: Path, optimizer: str) -> None:
    write_dataset(tmp_path / "data")
    run = tmp_path / "run"
    flags = flags_of(tmp_path, run, "--optimizer", optimizer)
    assert ranks.run(train, [*flags, "--exit-interval", "2"], world_size=1)[0][:2] == (0, "")
    before = listing(run)
    code, error, _ = ranks.run(train_with, flags, Fault("attention", (3,)), world_size=1)[0]
    assert (code, error) == (3, f"{ATTENTION.format(rank=0)}16 to 17{REMEDY}")
    assert listing(run) == before
    assert ranks.run(train, flags, world_size=1)[0][:2] == (0, "")


def test_an_update_that_is_not_finite_is_not_saved(ranks: RankPools, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    run = tmp_path / "run"
    flags = flags_of(tmp_path, run)
    code, error, _ = ranks.run(train_with, flags, Fault("update", (3,)), world_size=1)[0]
    assert (code, error) == (
        3,
        "embedding.word_embeddings.weight on rank 0 is not finite, so iter_0000003 is not saved "
        "and the checkpoint before it stays the newest; start again from that one",
    )
    assert (run / POINTER).read_text() == "2"
    assert not (run / NEWEST).exists()


def test_what_is_not_finite_is_not_loaded(ranks: RankPools, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    run = tmp_path / "run"
    flags = [*flags_of(tmp_path, run), "--exit-interval", "3"]
    assert ranks.run(train_unchecked, flags, Fault("update", (3,)), world_size=1)[0][0] == 0
    code, error, _ = ranks.run(train, flags_of(tmp_path, run), world_size=1)[0]
    assert (code, error) == (
        1,
        f"embedding.word_embeddings.weight on rank 0 is not finite in {run / NEWEST}, so no "
        "training can go on from it; move it away to start from the one before, or name one with "
        "--ckpt-step",
    )
    (run / NEWEST).rename(tmp_path / "away")
    assert ranks.run(train, flags_of(tmp_path, run), world_size=1)[0][:2] == (0, "")


def train_unchecked(rank: int, world_size: int, flags: list[str], fault: Fault) -> tuple[int, str]:
    """Train as a run does that saves whatever it has."""
    from megatron_trinity.training import checkpoints

    original = checkpoints.nonfinite_value
    checkpoints.nonfinite_value = lambda *_: None
    try:
        return train_with(rank, world_size, flags, fault)[:2]
    finally:
        checkpoints.nonfinite_value = original


UNTRUSTED = (
    "iteration {} has a result on rank 0 that is not trusted, or another one when it is run again, "
    "in samples "
)


@pytest.mark.parametrize("kind", ["persistent", slow("transient")])
def test_a_result_that_is_not_trusted(ranks: RankPools, tmp_path: Path, kind: str) -> None:
    """Megatron's machine would save such a step as no later start can load it."""
    write_dataset(tmp_path / "data")
    run = tmp_path / "run"
    flags = flags_of(tmp_path, run, "--save-interval", "2")
    code, error, _ = ranks.run(train_with, flags, Fault(kind, (4,)), world_size=1)[0]
    assert (code, error) == (3, UNTRUSTED.format(4) + "24 to 31" + ELSEWHERE)
    assert (run / POINTER).read_text() == "2"
    assert sorted(path.name for path in run.glob("iter_*")) == ["iter_0000002"]
    assert ranks.run(train, flags, world_size=1)[0][:2] == (0, "")


def train_as_megatron(rank: int, world_size: int, flags: list[str], fault: Fault) -> int:
    """Train with the rerun machine as it is, which saves when it ends a run; the exit code."""
    from megatron.core.rerun_state_machine import RerunStateMachine

    ours = RerunStateMachine.should_checkpoint_and_exit
    RerunStateMachine.should_checkpoint_and_exit = ours.__wrapped__
    try:
        return train_with(rank, world_size, flags, fault)[0]
    finally:
        RerunStateMachine.should_checkpoint_and_exit = ours


def test_what_megatron_saved_of_such_a_step_is_skipped(ranks: RankPools, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    run = tmp_path / "run"
    flags = flags_of(tmp_path, run, "--save-interval", "2")
    code = ranks.run(train_as_megatron, flags, Fault("persistent", (4,)), world_size=1)[0]
    assert (code, (run / POINTER).read_text()) == (16, "3")
    fault = (
        "rerun_state_machine_state/shard_0_1 cannot be read: a pickle in it names "
        "megatron.core.rerun_state_machine.Call, which no checkpoint consists of; nothing was "
        "executed"
    )
    inspection = inspect_checkpoint(run, checksums=True)
    assert (inspection.faults, inspection.unreadable) == ([], [fault])
    outcome = ranks.run(train, flags, world_size=1)[0]
    assert outcome[:2] == (0, "")
    assert warnings_of(outcome) == [f"WARNING: skipped {run / NEWEST}: {fault}"]
    assert (run / POINTER).read_text() == "4"


def test_a_run_that_saves_nothing(ranks: RankPools, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    flags = flags_of(tmp_path, tmp_path / "run")
    place = flags.index("--save")
    flags = [*flags[:place], *flags[place + 6 :]]
    flags += ["--error-injection-rate", "1", "--error-injection-type", "persistent_error"]
    code, error, _ = ranks.run(train, flags, world_size=1)[0]
    assert (code, error) == (3, UNTRUSTED.format(1) + "0 to 7" + ELSEWHERE)


@pytest.mark.parametrize("optimizer", ["muon", slow("adam")])
def test_steps_that_are_left_out(ranks: RankPools, tmp_path: Path, optimizer: str) -> None:
    """Weights, moments, biases and schedule stay; the data goes on, and so does the count."""
    write_dataset(tmp_path / "data")
    flags = ["--optimizer", optimizer, "--skip-nonfinite-steps", "2", "--train-iters", "6"]
    flags = flags_of(tmp_path, tmp_path / "run", *flags)
    fault = Fault("attention", (2, 3, 5))
    outcome = ranks.run(train_with, flags, fault, world_size=1)[0]
    assert outcome[:2] == (0, "")
    assert [line for line in outcome[2].splitlines() if "left out" in line] == [
        f"WARNING: {ATTENTION.replace('3', number, 1).format(rank=0)}{samples}; left out, {of} of "
        "2 in a row"
        for number, samples, of in (("2", "8 to 9", 1), ("3", "16 to 17", 2), ("5", "32 to 33", 1))
    ]
    steps = events_of(tmp_path / "run", "step")
    assert [step["applied"] for step in steps] == [True, False, False, True, False, True]
    lines = [line.split() for line in outcome[2].splitlines() if re.match(r" +\d/6 ", line)]
    assert [line[2] == "-" for line in lines] == [not step["applied"] for step in steps]
    assert [(e["what"], e["iteration"]) for e in events_of(tmp_path / "run", "alarm")] == [
        ("not finite", 2),
        ("not finite", 3),
        ("not finite", 5),
    ]
    before, after = (checkpoint_contents(tmp_path / "run", number) for number in (1, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    rates = [step["values"]["learning-rate"] for step in steps]
    assert [rates[place] for place in (1, 2, 4)] == [rates[0], rates[0], rates[3]]


@pytest.mark.slow
def test_the_data_goes_on_behind_a_step_that_is_left_out(ranks: RankPools, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    # Weights and biases stay what they are, so a loss is its samples' alone.
    still = ("--lr", "0", "--lr-warmup-iters", "0", "--load-balancing", "none")
    flags = flags_of(tmp_path, tmp_path / "run", *still, "--skip-nonfinite-steps", "2")
    fault = Fault("attention", (2, 3))
    assert ranks.run(train_with, flags, fault, tmp_path / "broken", world_size=1)[0][0] == 0
    whole = flags_of(tmp_path, tmp_path / "whole", *still)
    assert ranks.run(train, whole, tmp_path / "steps", world_size=1)[0][0] == 0
    broken, steps = dict(recorded(tmp_path / "broken")), dict(recorded(tmp_path / "steps"))
    assert [broken[number] == steps[number] for number in (1, 2, 3, 4)] == [1, 0, 0, 1]


def test_too_many_in_a_row(ranks: RankPools, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    flags = flags_of(tmp_path, tmp_path / "run", "--skip-nonfinite-steps", "1")
    fault = Fault("attention", (1, 3, 4))
    code, error, _ = ranks.run(train_with, flags, fault, world_size=1)[0]
    assert (code, error.split(":")[0]) == (3, "iteration 4 is not finite")
    assert (tmp_path / "run" / POINTER).read_text() == "3"
