"""What the benchmark of data compares is the same number of tokens of the same datasets."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.data import SEQ_LENGTH, ours, write_indexed
from megatron_trinity.data.indexed import check_indexed_dataset


@pytest.mark.parametrize("sparse", [False, True])
def test_what_is_written_is_an_indexed_dataset(tmp_path: Path, sparse: bool) -> None:
    write_indexed(tmp_path / "some", 40, seed=1, mean=300, sparse=sparse)
    info = check_indexed_dataset(tmp_path / "some")
    assert info.documents == 40
    dataset = ours([tmp_path / "some"], [1.0], masking=True)
    sample = dataset[0]
    assert sample["tokens"].shape == (SEQ_LENGTH,)
    assert bool(sample["tokens"].any()) is not sparse
