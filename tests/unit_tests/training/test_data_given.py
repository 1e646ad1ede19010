"""What a run is told of its data."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_trinity.data.corpus import Part
from megatron_trinity.data.description import Description, PlannedPhase, Source
from megatron_trinity.data.packings import PACKINGS
from megatron_trinity.data.plan import Plan
from megatron_trinity.data.run_data import RunData
from megatron_trinity.data.samples import SampleFormat
from megatron_trinity.training.data_given import note_data
from tests.trainer import SEQUENCE, VOCAB_SIZE, write_dataset


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_run_knows_whether_its_rows_are_padded(tmp_path: Path, packing: str) -> None:
    write_dataset(tmp_path / "data")
    source = Source("a", (Part(str(tmp_path / "data")),))
    plan = Plan(Description((source,), (PlannedPhase(packing=packing),)), SEQUENCE, 1)
    args = Namespace()
    note_data(args, RunData(plan, (), (), None))
    layout = SampleFormat(SEQUENCE, VOCAB_SIZE, masking=True)
    samples = [layout.sample(*plan.pieces(number)) for number in range(60)]
    assert args.padded_rows == any(sample["cu_seqlens"][-1] < SEQUENCE for sample in samples)


def test_what_is_not_trained_on_is_not_padded(tmp_path: Path) -> None:
    for data in (None, RunData(None, (), (), None)):
        args = Namespace()
        note_data(args, data)
        assert args.padded_rows is False
