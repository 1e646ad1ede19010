"""Mistakes and failures that the trainer meets: one clear line, an exit code, nothing lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_trinity.errors import TrinityError
from tests.distributed.pool import RankPools
from tests.trainer import (
    VOCAB_SIZE,
    checkpoint_contents,
    run_trainer,
    training_flags,
    write_dataset,
)

Refusal = tuple[int, str]


def refusal(rank: int, world_size: int, flags: Sequence[str]) -> Refusal:
    """Exit code and line of a trainer that refuses or fails."""
    try:
        code = run_trainer(rank, world_size, flags)
    except TrinityError as error:
        return error.exit_code, str(error)
    raise AssertionError(f"the trainer ended with {code}")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data_train")
    return tmp_path / "data_train"


def check(result: Refusal, code: int, *words: str) -> None:
    assert result[0] == code
    assert "\n" not in result[1]
    for word in words:
        assert word in result[1]


def run_refused(ranks: RankPools, flags: Sequence[str], world_size: int = 1) -> Refusal:
    results: list[Refusal] = ranks.run(refusal, flags, world_size=world_size)
    return results[0]


def test_data_that_is_not_there(ranks: RankPools, tmp_path: Path) -> None:
    flags = training_flags(tmp_path / "nowhere", "--train-iters", "3")
    check(run_refused(ranks, flags), 1, str(tmp_path / "nowhere.idx"), "prepare_data.py")


def test_no_data_at_all(ranks: RankPools, data: Path) -> None:
    flags = training_flags(data, "--train-iters", "3")
    for flag in ("--train-data-path", "--valid-data-path"):
        place = flags.index(flag)
        del flags[place : place + 2]
    check(run_refused(ranks, flags), 2, "--train-data-path")


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_a_truncated_dataset(ranks: RankPools, data: Path, suffix: str) -> None:
    file = Path(f"{data}{suffix}")
    file.write_bytes(file.read_bytes()[:-7])
    flags = training_flags(data, "--train-iters", "3")
    check(run_refused(ranks, flags), 1, str(file), "prepare_data.py")


def test_a_corrupt_index(ranks: RankPools, data: Path) -> None:
    file = Path(f"{data}.idx")
    file.write_bytes(b"not an index" + file.read_bytes()[12:])
    flags = training_flags(data, "--train-iters", "3")
    check(run_refused(ranks, flags), 1, str(file))


def test_tokens_that_the_model_has_not(ranks: RankPools, data: Path, tmp_path: Path) -> None:
    manifest = {"splits": {"train": {"max_token_id": VOCAB_SIZE}}}
    (tmp_path / "data.json").write_text(json.dumps(manifest))
    flags = training_flags(data, "--train-iters", "3")
    check(run_refused(ranks, flags), 2, str(data), f"token {VOCAB_SIZE}")


@pytest.mark.parametrize(
    ("workers", "packing", "split"),
    [
        ("0", "sequential", "train"),
        ("2", "sequential", "train"),
        pytest.param("2", "best-fit", "train", marks=pytest.mark.slow),
        pytest.param("1", "sequential", "valid", marks=pytest.mark.slow),
    ],
)
def test_a_token_that_only_the_loader_meets(
    ranks: RankPools, data: Path, tmp_path: Path, workers: str, packing: str, split: str
) -> None:
    """Without a manifest nobody knows of it ahead; a worker of the loader is another process."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    other = tmp_path / "other"
    builder = IndexedDatasetBuilder(f"{other}.bin", dtype=DType.optimal_dtype(200))
    for _ in range(40):
        builder.add_document(torch.tensor([5, 6, VOCAB_SIZE]), [3])
    builder.finalize(f"{other}.idx")
    flags = training_flags(
        data,
        *("--train-iters", "3", "--num-workers", workers, "--packing", packing),
        *("--dataloader-inter-document-masking", f"--{split}-data-path", str(other)),
    )
    of = f"of {other} has token {VOCAB_SIZE}, the model {VOCAB_SIZE} tokens"
    check(run_refused(ranks, flags), 1, of, "prepare it with the tokenizer of this run")


def test_a_preset_of_no_name(ranks: RankPools, data: Path) -> None:
    flags = training_flags(data, "--train-iters", "3", "--preset", "huge")
    check(run_refused(ranks, flags), 2, "huge", "tiny")


def test_an_unknown_key_in_a_preset(ranks: RankPools, data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("megatron:\n  num-layerz: 4\n")
    flags = training_flags(data, "--train-iters", "3", "--preset", str(tmp_path / "mine.yaml"))
    check(run_refused(ranks, flags), 2, "num-layerz", "mine.yaml")


@pytest.mark.parametrize("flag", ["--tensor-model-parallel-size", "--expert-model-parallel-size"])
def test_ranks_that_do_not_fit_the_layout(ranks: RankPools, data: Path, flag: str) -> None:
    flags = training_flags(data, "--train-iters", "3", flag, "4", "--sequence-parallel")
    check(run_refused(ranks, flags, world_size=2), 2, "2 ranks", flag)


def test_a_tokenizer_larger_than_the_model(ranks: RankPools, data: Path, tmp_path: Path) -> None:
    from megatron_trinity.data.tokenizer import save_tokenizer, train_tokenizer

    (tmp_path / "tokenizer").mkdir()
    save_tokenizer(train_tokenizer(["some text, some more text"] * 9, 270), tmp_path / "tokenizer")
    flags = training_flags(
        data,
        *("--train-iters", "3", "--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", str(tmp_path / "tokenizer")),
    )
    check(run_refused(ranks, flags), 2, "the tokenizer has 2", f"the model {VOCAB_SIZE}")


def test_a_flag_that_nobody_knows(ranks: RankPools, data: Path) -> None:
    check(run_refused(ranks, training_flags(data, "--sliding-windows", "3")), 2, "sliding-windows")


def test_a_requirement_of_megatrons(ranks: RankPools, data: Path, tmp_path: Path) -> None:
    flags = training_flags(data, "--train-iters", "3", "--save", str(tmp_path / "run"))
    check(run_refused(ranks, flags), 2, "--save-interval")


def saving_flags(data: Path, run: Path, *flags: str) -> list[str]:
    return training_flags(
        data,
        *("--save", str(run), "--load", str(run), "--save-interval", "1", "--optimizer", "adam"),
        *("--lr-decay-iters", "9", *flags),
    )


def test_a_checkpoint_of_another_model(ranks: RankPools, data: Path, tmp_path: Path) -> None:
    flags = saving_flags(data, tmp_path / "run", "--train-iters", "1")
    assert ranks.run(run_trainer, flags, world_size=1) == [0]
    before = checkpoint_contents(tmp_path / "run", 1)
    other = [*flags, "--hidden-size", "32", "--num-experts", "4"]
    words = ("--hidden-size is 64 there and 32 here", "--num-experts is 8 there and 4 here")
    check(run_refused(ranks, other), 2, str(tmp_path / "run"), *words)
    after = checkpoint_contents(tmp_path / "run", 1)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--optimizer", "adam"], "needs that of --optimizer adam"),
        (["--router-optimizer", "adamw"], "--optimizer muon --router-optimizer adamw"),
    ],
)
def test_a_checkpoint_of_another_optimizer(
    ranks: RankPools, data: Path, tmp_path: Path, flags: list[str], named: str
) -> None:
    muon = [*saving_flags(data, tmp_path / "run", "--train-iters", "1"), "--optimizer", "muon"]
    assert ranks.run(run_trainer, muon, world_size=1) == [0]
    has = "has the state of --optimizer muon --router-optimizer muon"
    check(run_refused(ranks, [*muon, *flags]), 2, has, named, "--no-load-optim")
    without = [*muon, *flags, "--no-load-optim", "--train-iters", "2"]
    without.append("--override-opt-param-scheduler")
    assert ranks.run(run_trainer, without, world_size=1) == [0]


def test_a_checkpoint_without_optimizer_state(ranks: RankPools, data: Path, tmp_path: Path) -> None:
    flags = saving_flags(data, tmp_path / "run", "--train-iters", "1")
    assert ranks.run(run_trainer, [*flags, "--no-save-optim"], world_size=1) == [0]
    check(run_refused(ranks, flags), 2, "has no state of an optimizer", "--no-load-optim")


def test_a_checkpoint_that_would_execute_something(
    ranks: RankPools, data: Path, tmp_path: Path
) -> None:
    flags = saving_flags(data, tmp_path / "run", "--train-iters", "1")
    assert ranks.run(run_trainer, flags, world_size=1) == [0]
    trace = tmp_path / "executed"
    payload = f"cos\nmkdir\n(V{trace}\ntR.".encode()
    iteration = tmp_path / "run" / "iter_0000001"
    (iteration / ".metadata").write_bytes(payload)
    check(run_refused(ranks, flags), 1, ".metadata has", "is whole")
    (iteration / "manifest.json").unlink()  # as one from elsewhere, which has none
    named = [*flags, "--ckpt-step", "1"]
    check(run_refused(ranks, named), 1, "names os.mkdir", "nothing was executed")
    assert not trace.exists()


def test_a_schedule_that_has_changed(ranks: RankPools, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = saving_flags(data, run, "--train-iters", "1")
    assert ranks.run(run_trainer, flags, world_size=1) == [0]
    longer = [*flags, "--train-iters", "2"]
    check(run_refused(ranks, longer), 1, "schedule", "--override-opt-param-scheduler")
    assert ranks.run(run_trainer, [*longer, "--override-opt-param-scheduler"], world_size=1) == [0]
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "2"
