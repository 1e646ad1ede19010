"""What becomes of a step that must not be applied: the run ends, or goes on without it."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.training.utils import print_rank_last

from megatron_trinity.errors import StepError
from megatron_trinity.reporting.events import alarm
from megatron_trinity.training.nonfinite import (
    ForwardTrace,
    Place,
    first_of_all,
    last_gradient,
    samples_of,
)
from megatron_trinity.upstream.training_hooks import StepOutcome

REMEDY = (
    "it is not applied, and no checkpoint has it: start again {}, or with --skip-nonfinite-steps "
    "to leave such steps out"
)
DIVERGED, NOT_TRUSTED = "with a lower --lr", "on other hardware"


class StepGuard:
    """Judges every step on all ranks alike; neither weights nor state have changed by then.

    Args:
        args: `skip_nonfinite_steps` is how many in a row are left out before the run ends.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._in_a_row = 0
        self._trace: ForwardTrace | None = None

    def restarted(self, model: Sequence[Any]) -> None:
        """Megatron runs the step again, since a rank has a bad result: look where it comes from."""
        self._end_trace()
        self._trace = ForwardTrace(model)

    def drops(self, model: Sequence[Any], outcome: StepOutcome) -> bool:
        """Whether the step is to be forgotten, which is said in a line.

        Raises:
            StepError: too many in a row; says what was not finite, and where.
        """
        traced = self._trace.first if self._trace else None
        self._end_trace()
        if not _is_bad(outcome):
            if outcome.applied:
                self._in_a_row = 0
            return False
        reason, way_out = _reason(self._args.curr_iteration + 1, model, outcome, traced)
        self._in_a_row += 1
        allowed = self._args.skip_nonfinite_steps
        if self._in_a_row > allowed:
            raise StepError(f"{reason}; {REMEDY.format(way_out)}")
        line = f"{reason}; left out, {self._in_a_row} of {allowed} in a row"
        print_rank_last(f"WARNING: {line}")
        alarm("not finite", line, self._args.curr_iteration + 1)
        return True

    def _end_trace(self) -> None:
        if self._trace is not None:
            self._trace.close()
            self._trace = None


def _is_bad(outcome: StepOutcome) -> bool:
    """Whether a step was refused for what it computed, the same on every rank."""
    if outcome.applied:
        return False
    if outcome.rejected or (outcome.norm is not None and not math.isfinite(outcome.norm)):
        return True
    if outcome.norm is not None:
        return False  # above Megatron's threshold
    # With a loss scale, gradients that overflow are the scale's to mend; a loss is not.
    infinite = any(not value.isfinite().all() for value in outcome.losses.values())
    flag = torch.tensor([infinite], dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _reason(
    iteration: int, model: Sequence[Any], outcome: StepOutcome, traced: Place | None
) -> tuple[str, str]:
    """In words, what was not finite first, and what to try in a next start. Collective."""
    place = first_of_all(traced) or first_of_all(last_gradient(model))
    if place is not None:
        first, last = place.samples
        what = f"{place.what} first, on rank {place.rank}, in samples {first} to {last}"
        return f"iteration {iteration} is not finite: {what}", DIVERGED
    ranks: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(ranks, bool(outcome.rejected and outcome.rejected.here))
    first, last = samples_of(None)
    where = f" on rank {ranks.index(True)}" if any(ranks) else ""
    what = f"a result{where} that is not trusted, or another one when it is run again"
    return f"iteration {iteration} has {what}, in samples {first} to {last}", NOT_TRUSTED
