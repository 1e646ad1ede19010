"""Spikes: a loss or a gradient norm far above what it has been of late."""

from __future__ import annotations

import json
import math
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.training.utils import print_rank_last

from megatron_trinity.checkpoint.iterations import newest_saved, number_of
from megatron_trinity.errors import SpikeError, StepError
from megatron_trinity.reporting.events import alarm
from megatron_trinity.upstream.checkpoint_tracker import replacing

SKIPPED = "skipped_steps.json"
"""File of the save directory: the steps whose data is left out, by every start from then on."""

LOSS, NORM = "lm loss", "gradient norm"

NO_NORM = -1.0
"""A threshold that every norm is above."""

HISTORY = "spike_history"
"""Argument that holds what the medians are of; arguments are saved with every checkpoint."""


class Spikes:
    """Judges each step by the medians of the steps before it.

    The history is part of every checkpoint, so that a run that goes on judges as it would have.
    A value that is a spike does not enter it.

    Args:
        args: `spike_factor`; `spike_window`, how many steps a median is of: none is judged before
            half of them have ended.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._in_a_row = 0
        self._loss: float | None = None  # of the step under way, where it is known before its end
        if not hasattr(args, HISTORY):
            setattr(args, HISTORY, {})

    def limit(self, name: str) -> float:
        """What the next value of that name may be at most."""
        past = getattr(self._args, HISTORY).get(name, [])
        known = self._args.spike_factor and len(past) >= self._args.spike_window // 2
        return self._args.spike_factor * median(past) if known else math.inf

    @property
    def leaves_out(self) -> bool:
        """Whether a step that is a spike is not applied."""
        return bool(self._args.spike_factor) and self._args.spike_action == "skip"

    def begins(self, optimizer: Any) -> None:
        """Have the optimizer leave out a step whose gradient norm will be a spike."""
        if self.leaves_out:
            _leave_out_above(optimizer, self.limit(NORM))

    def loss_known(self, optimizer: Any, loss: float) -> None:
        """Have the optimizer leave the step out if its loss is a spike; the same on every rank."""
        self._loss = loss
        if loss > self.limit(LOSS):
            _leave_out_above(optimizer, NO_NORM)

    def loss(self, of_last_stage: float | None) -> float:
        """The loss that a step is judged by, on every rank.

        It is what was known before the update, or else that of the last stage, which is None
        elsewhere; the host waits for that if there are several stages.
        """
        known, self._loss = self._loss, None
        return on_all_stages(of_last_stage) if known is None else known

    def ends(self, iteration: int, values: Mapping[str, float], applied: bool) -> None:
        """Judge a step by its values, which are the same on every rank.

        Raises:
            StepError: one too many in a row was left out, or the run goes back to a checkpoint.
        """
        found = [
            f"the {name} is {value:.4g}, above {limit:.4g}"
            for name, value in values.items()
            if value > (limit := self.limit(name))
        ]
        if not found:
            if applied:
                self._in_a_row = 0
                self._note(values)
            return
        what, action = f"iteration {iteration} is a spike: {'; '.join(found)}", "it is applied"
        if self._args.spike_action == "rewind":
            raise rewind(self._args, iteration, what)
        if not applied:
            self._in_a_row += 1
            action = f"left out, {self._in_a_row} of {self._args.spike_skips} in a row"
        if self._in_a_row > self._args.spike_skips:
            raise StepError(f"{what}; more than --spike-skips {self._args.spike_skips} in a row")
        print_rank_last(f"WARNING: {what}; {action}")
        alarm("spike", f"{what}; {action}", iteration)

    def _note(self, values: Mapping[str, float]) -> None:
        # New lists: what writes a checkpoint may be reading the old ones.
        past: dict[str, list[float]] = getattr(self._args, HISTORY)
        window = self._args.spike_window
        new = {name: [*past.get(name, []), value][-window:] for name, value in values.items()}
        setattr(self._args, HISTORY, {**past, **new})


def _leave_out_above(optimizer: Any, norm: float) -> None:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.config.grad_norm_skip_threshold = norm


def rewind(args: Namespace, iteration: int, what: str) -> SpikeError:
    """The error that ends the run, with a note of the steps that the next start leaves out."""
    save = Path(args.save)
    newest = newest_saved(save)
    first = (0 if newest is None else number_of(newest)) + 1
    if int(os.environ.get("RANK", "0")) == 0:
        steps = sorted({*noted(save), *range(first, iteration + 1)})
        with replacing(save / SKIPPED) as stream:
            stream.write(json.dumps(steps))
    return SpikeError(
        f"{what}; start again, which leaves out the data of iterations {first} to {iteration}"
    )


def on_all_stages(loss: float | None) -> float:
    """The loss of the last pipeline stage, on every rank; the host waits if there are several."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        assert loss is not None
        return loss
    known = -math.inf if loss is None else loss
    value = torch.full((1,), known, dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
    return value.item()


def noted(save: Path) -> list[int]:
    """The steps whose data is left out in the run that saves there."""
    try:
        steps: list[int] = json.loads((save / SKIPPED).read_text())
    except FileNotFoundError:
        return []
    return steps
