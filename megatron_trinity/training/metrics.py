"""What is logged after each step beside the losses: speed and memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import get_args, get_timers

from megatron_trinity.reporting.names import MEMORY, SPEED, THROUGHPUT

GIB = 2**30


def tokens_per_step() -> int:
    """Tokens in the current global batch."""
    tokens: int = get_current_global_batch_size() * get_args().seq_length
    return tokens


class StepMetrics:
    """Tokens per second over all ranks, their throughput if asked, and the peak memory of this one.

    Time is that of Megatron's `interval-time`, which stands still while it saves or evaluates.

    Attributes:
        seconds: that the newest step took.
    """

    def __init__(
        self,
        tokens: Callable[[], int] = tokens_per_step,
        flops_per_gpu: Callable[[], float] | None = None,
    ) -> None:
        """Both are of the step that has just ended; `flops_per_gpu` asks for throughput."""
        self._tokens = tokens
        self._flops = flops_per_gpu
        self._elapsed = 0.0  # seconds on the timer when the step began
        self.seconds = 0.0

    def step_ended(self) -> dict[str, float]:
        """The values of one step."""
        self.seconds = self._interval() - self._elapsed
        values = {SPEED: self._tokens() / self.seconds}
        if self._flops is not None:
            values[THROUGHPUT] = self._flops() / self.seconds / 1e12
        return {**values, MEMORY: torch.cuda.max_memory_allocated() / GIB}

    def log_written(self) -> None:
        """Note where the next step begins; a log line may have set the timer back to zero."""
        self._elapsed = self._interval()

    def _interval(self) -> float:
        """What the timer shows.

        Its own function would wait for the device; a step has ended when its values are read.
        """
        timer = get_timers()("interval-time")
        running: float = time.time() - timer._start_time if timer._started else 0.0
        return float(timer._elapsed + running)
