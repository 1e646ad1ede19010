"""What a step sends: no more than AdamW's, in few collectives, counted from the real calls."""

from __future__ import annotations

import pytest

from benchmarks.communication import count

CASES = [("nano", 64), ("large", 512), ("nano", 512), ("mini", 512), ("large", 2048)]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "world_size"), CASES)
def test_bytes_and_collectives_of_a_step(preset: str, world_size: int) -> None:
    ours, adamw = (count(preset, world_size, way) for way in ("ours", "adamw"))
    sent = sum(ours.bytes.values())
    assert 0.99 < sent / sum(adamw.bytes.values()) < 1.05
    calls = {
        name: sum(n for k, n in ours.calls.items() if k.name == name)
        for name in ("reduce-scatter", "all-gather", "all-to-all", "all-reduce", "broadcast")
    }
    assert calls["reduce-scatter"] == calls["all-gather"]  # two a bucket
    assert calls["all-reduce"] == 1  # the norm
    assert calls["broadcast"] == 0
    assert calls["all-to-all"] % 2 == 0  # two a batch


@pytest.mark.slow
def test_one_gather_a_bucket_weighs_what_the_weights_do() -> None:
    """bf16 weights once and fp32 gradients once, of every parameter but for its own share."""
    wire = count("nano", 64, "adamw")
    of = {
        name: sum(n for k, n in wire.bytes.items() if k.name == name)
        for name in ("reduce-scatter", "all-gather")
    }
    assert of["reduce-scatter"] == pytest.approx(2 * of["all-gather"], rel=1e-3)
