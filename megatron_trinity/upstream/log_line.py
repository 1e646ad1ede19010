"""Megatron's log line is of its own interval of steps, and leaves throughput to us."""

from __future__ import annotations

import contextlib
import functools
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="log-line",
    symbols=("megatron.training.training.training_log",),
    reason=(
        "after a start Megatron logs the first step out of turn and goes on adding up. Where the "
        "step was due anyway, its losses and time are counted again in the next line: with "
        "`--log-interval 1` the second line is the mean of two steps. It prints throughput with "
        "one digit behind the point, which is 0.0 TFLOP/s for a small model, and a loss of 0 "
        "where no step of the interval was applied"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="a first step that is due starts the next interval; throughput has its digits; "
    "there is no mean of no losses",
)


def install() -> None:
    """Log a first step that is due as any other; leave throughput to `training-hooks`."""
    from megatron.training import training

    training.training_log = _as_any_other(training.training_log, training.get_args)


def _as_any_other(
    training_log: Callable[..., Any], get_args: Callable[[], Namespace]
) -> Callable[..., Any]:
    @functools.wraps(training_log)
    def log(
        loss_dict: Any,
        total_loss_dict: Any,
        learning_rate: Any,
        iteration: int,
        loss_scale: Any,
        report_memory_flag: Any,
        skipped_iter: Any,
        *args: Any,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> Any:
        options = get_args()
        due = iteration % options.log_interval == 0
        none = due and skipped_iter and not total_loss_dict.get("advanced iterations")
        with _without_throughput(options), _without_losses(total_loss_dict if none else {}):
            return training_log(
                loss_dict,
                total_loss_dict,
                learning_rate,
                iteration,
                loss_scale,
                report_memory_flag,
                skipped_iter,
                *args,
                is_first_iteration=is_first_iteration and not due,
                **kwargs,
            )

    return log


@contextlib.contextmanager
def _without_throughput(options: Namespace) -> Iterator[None]:
    asked = options.log_throughput
    options.log_throughput = False
    try:
        yield
    finally:
        options.log_throughput = asked


@contextlib.contextmanager
def _without_losses(totals: dict[str, Any]) -> Iterator[None]:
    """Have none of these sums printed, which are zeros: Megatron leaves out what is below 0."""
    sums = [value for value in totals.values() if isinstance(value, torch.Tensor)]
    for value in sums:
        value.fill_(-1.0)
    try:
        yield
    finally:
        for value in sums:  # where it is due, Megatron has new ones already
            value.zero_()
