"""DALI's loader gives what torch's gives: the same batches, the same training."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.distributed.pool import RankPools
from tests.stress.exactly_once import exactly_once
from tests.trainer import SEQUENCE, checkpoint_contents, run_trainer, training_flags, write_dataset

PACKINGS = {"sequential": {}, "document-buffer": {"size": 4, "buffers": 3}, "best-fit": {}}


def batches_differ(
    rank: int, world_size: int, data: str, packing: str, consumed: int, micro_batch: int
) -> list[str]:
    """What differs between the first batches of both loaders, as this rank of all reads them."""
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
    from torch.utils.data import DataLoader

    from megatron_trinity.data.corpus import Part
    from megatron_trinity.data.dali import DaliLoader
    from megatron_trinity.data.datasets import TrainingDataset
    from megatron_trinity.data.description import Description, PlannedPhase, Source
    from megatron_trinity.data.plan import Plan
    from megatron_trinity.data.samples import SampleFormat

    phase = PlannedPhase(packing=packing, options=PACKINGS[packing])
    described = Description((Source("all", (Part(data),)),), (phase,))
    form = SampleFormat(SEQUENCE, 160, masking=True)
    dataset, other = (TrainingDataset(Plan(described, SEQUENCE, 5), form) for _ in range(2))
    sampler = MegatronPretrainingSampler(len(other), consumed, micro_batch, rank, world_size)
    ours = DaliLoader(dataset, consumed, micro_batch, rank, world_size)
    theirs = DataLoader(other, batch_sampler=sampler)
    found = []
    for number, (a, b) in enumerate(zip(islice(ours, 12), theirs, strict=False)):
        assert list(a) == list(b)
        for key in b:
            if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key]):
                found.append(f"{key} of batch {number}")
    return found


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("consumed", "micro_batch"), [(0, 2), (10, 1), (4000, 3)])
def test_the_same_batches(
    dali_ranks: RankPools, tmp_path: Path, packing: str, consumed: int, micro_batch: int
) -> None:
    write_dataset(tmp_path / "data")
    found = dali_ranks.run(
        batches_differ, str(tmp_path / "data"), packing, consumed, micro_batch, world_size=2
    )
    assert found == [[], []]


def test_the_same_training_over_a_resume_and_another_layout(
    dali_ranks: RankPools, tmp_path: Path
) -> None:
    """Two steps on two data-parallel ranks, then two on one."""
    write_dataset(tmp_path / "data")
    for loader in ("single", "dali"):
        for steps, ranks, batch in ((2, 2, "2"), (4, 1, "4")):
            argv = training_flags(
                tmp_path / "data",
                *("--dataloader-type", loader, "--train-iters", "4"),
                *("--micro-batch-size", batch, "--exit-interval", str(steps)),
                *("--save", str(tmp_path / loader), "--load", str(tmp_path / loader)),
                *("--save-interval", "2", "--packing", "document-buffer"),
                *("--document-buffer-size", "5", "--dataloader-inter-document-masking"),
            )
            assert dali_ranks.run(run_trainer, argv, world_size=ranks) == [0] * ranks
    expected = checkpoint_contents(tmp_path / "single", 4)
    got = checkpoint_contents(tmp_path / "dali", 4)
    assert got.keys() == expected.keys()
    assert [key for key in got if not torch.equal(got[key], expected[key])] == []


def test_a_kill_loses_and_repeats_no_token(dali_ranks: RankPools, tmp_path: Path) -> None:
    buffer = ["document-buffer"]
    killed = exactly_once(tmp_path / "kills", 1, 3, print, buffer, dali_ranks.kind, ["dali"])
    assert killed == {"document-buffer": 1}


def refused(rank: int, world_size: int, flags: list[str]) -> str:
    from megatron_trinity.errors import TrinityError

    try:
        run_trainer(rank, world_size, flags)
    except TrinityError as error:
        return str(error)
    raise AssertionError("the run has ended")


@pytest.mark.parametrize("bad", [1, 400])
def test_a_token_without_an_embedding_is_one_line(
    dali_ranks: RankPools, tmp_path: Path, bad: int
) -> None:
    """Of the first sample, and of one that DALI asks for ahead of the steps."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{tmp_path / 'data'}.bin", dtype=DType.optimal_dtype(200))
    for number in range(400):
        builder.add_document(torch.tensor([5, 6, 180 if number % bad == 0 else 7]), [3])
    builder.finalize(f"{tmp_path / 'data'}.idx")
    flags = training_flags(
        tmp_path / "data",
        *("--train-iters", "20", "--dataloader-type", "dali", "--packing", "greedy"),
        *("--dataloader-inter-document-masking", "--eval-iters", "0"),
    )
    [line] = dali_ranks.run(refused, flags, world_size=1)
    assert "\n" not in line
    assert f"of {tmp_path / 'data'} has token 180, the model 160 tokens" in line
