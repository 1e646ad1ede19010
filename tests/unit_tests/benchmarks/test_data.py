"""What the benchmark of data compares is the same number of tokens of the same datasets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.data import SEQ_LENGTH, alternate, loader, ours, tokens_per_second, write_indexed
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


def test_sides_make_the_same_samples_in_turn() -> None:
    made: list[tuple[str, range]] = []

    def side(name: str, speeds: list[float]) -> Callable[[range], float]:
        def speed(part: range) -> float:
            made.append((name, part))
            return speeds.pop(0)

        return speed

    row = alternate("case", [side("a", [6e6, 1e6, 8e6]), side("b", [3e6, 5e6, 2e6])], 10, 3)
    parts = [range(10), range(10, 20), range(20, 30)]
    assert made == [(name, part) for part in parts for name in "ab"]
    assert (row["ours"], row["peer"], row["ratio"]) == (6.0, 3.0, 2.0)


def test_tokens_are_counted_over_the_seconds(tmp_path: Path) -> None:
    write_indexed(tmp_path / "some", 40, seed=1, mean=900, sparse=False)
    dataset = ours([tmp_path / "some"], [1.0], True, "best-fit", length=64)
    clock = iter([5.0, 7.0])
    assert tokens_per_second(loader(dataset, range(3, 15)), lambda: next(clock)) == 12 * 64 / 2
