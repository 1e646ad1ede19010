"""What the benchmark of a step does around the steps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import count
from typing import Any

import pytest

from benchmarks.step import MICRO_BATCH, SEQUENCE, Times, alternate, check_same_start, rows
from megatron_trinity.errors import TrinityError


def test_sides_take_the_same_batches_in_turn_and_the_order_turns_around() -> None:
    taken: list[tuple[str, int]] = []

    def step(name: str, batch: Mapping[str, Any]) -> float:
        taken.append((name, batch["number"]))
        return 0.0

    data = ({"number": number} for number in count())
    sides = {name: partial(step, name) for name in "ab"}
    times = alternate(sides, data, steps=3, warm_up=1)
    assert taken == [
        *[("b", 0), ("a", 0), ("a", 1), ("b", 1)],
        *[("b", 2), ("a", 2), ("a", 3), ("b", 3)],
    ]
    assert [len(times[name].wall) for name in "ab"] == [3, 3]
    assert [len(times[name].cpu) for name in "ab"] == [3, 3]


def test_rows_are_tokens_per_second_of_medians() -> None:
    times = {
        "ours": Times(wall=[0.5, 0.25, 9.0], cpu=[1.0, 1.0, 1.0]),
        "peer": Times(wall=[1.0, 1.0, 1.0], cpu=[2.0, 3.0, 0.5]),
    }
    cpu, wall = rows(times, threads=2)
    tokens = MICRO_BATCH * SEQUENCE
    assert (cpu["case"], wall["case"]) == tuple(
        f"training step, 2 threads, {clock} time" for clock in ("cpu", "wall")
    )
    assert (cpu["ours"], cpu["peer"], cpu["ratio"]) == (tokens, tokens / 2, 2.0)
    assert (wall["ours"], wall["peer"], wall["ratio"]) == (tokens * 2, tokens, 2.0)


def test_a_different_start_is_an_error() -> None:
    check_same_start(lambda _: 7.0, lambda _: 7.00005, {})
    with pytest.raises(TrinityError, match=r"ours 7\.0000.*transformers 7\.0010"):
        check_same_start(lambda _: 7.0, lambda _: 7.001, {})
