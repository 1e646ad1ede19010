"""Tokens per second and memory, beside a clock that the test sets."""

from __future__ import annotations

import pytest
import torch

from megatron_trinity.training import metrics
from megatron_trinity.training.metrics import GIB, StepMetrics


class Clock:
    """Megatron's interval timer: runs, and is set back to zero by a log line."""

    _elapsed = 0.0
    _started = False

    def __call__(self, name: str) -> Clock:
        assert name == "interval-time"
        return self


def test_speed_is_that_of_the_step_across_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(metrics, "get_timers", lambda: clock)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * GIB)
    step = StepMetrics(lambda: 1000, lambda: 3e9)
    speeds = []
    for seconds, logs in ((2.0, False), (0.5, True), (4.0, True), (0.25, False)):
        clock._elapsed += seconds
        values = step.step_ended()
        assert values["peak memory (GiB)"] == 3.0
        speeds.append(values["tokens per second"])
        per_token = values["throughput per GPU (TFLOP/s/GPU)"] / values["tokens per second"]
        assert per_token == pytest.approx(3e9 / 1e12 / 1000, rel=1e-12, abs=0)
        if logs:
            clock._elapsed = 0.0
        step.log_written()
    assert speeds == [500.0, 2000.0, 250.0, 4000.0]
