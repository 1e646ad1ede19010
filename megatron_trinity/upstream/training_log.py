"""More values in Megatron's log line, TensorBoard and W&B.

Reason: `training_log` has no hook; what it prints and writes is what the loss function reported.
Written for: megatron-core 0.19.2.
Remove when: it takes metrics from the outside.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch


class Metrics(Protocol):
    """What `extend_training_log` calls on every rank around every step's log."""

    def step_ended(self) -> Mapping[str, float]:
        """Values of the step that has just ended, by their names in the log."""

    def log_written(self) -> None:
        """Told when Megatron has logged the step, and started its interval timer anew if due."""


def extend_training_log(metrics: Metrics) -> None:
    """Log the values of `metrics` beside the losses.

    They are averaged over the steps between two log lines, as losses are. Ranks that know no loss
    (all but those of the last pipeline stage) log nothing, as before.
    """
    from megatron.training import training

    original = inspect.unwrap(training.training_log)  # without an earlier call's metrics

    @functools.wraps(original)
    def training_log(loss_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        values = metrics.step_ended()
        if loss_dict:
            tensors = {
                name: torch.tensor([value], dtype=torch.float32, device=torch.cuda.current_device())
                for name, value in values.items()
            }
            loss_dict = {**loss_dict, **tensors}
        result = original(loss_dict, *args, **kwargs)
        metrics.log_written()
        return result

    training.training_log = training_log
