"""A step that is not finite or not reproducible is not applied, and saves nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_trinity.upstream.registry import Adaptation

_MACHINE = "megatron.core.rerun_state_machine.RerunStateMachine."
_CHAIN = "megatron.core.optimizer.optimizer.ChainedOptimizer."

ADAPTATION = Adaptation(
    name="rejected-steps",
    symbols=(
        f"{_MACHINE}should_run_forward_backward",
        f"{_MACHINE}should_checkpoint_and_exit",
        f"{_MACHINE}validate_result",
        f"{_CHAIN}get_grad_norm",
        f"{_CHAIN}step_with_ready_grads",
    ),
    reason=(
        "the rerun machine lets the first iteration after a start through, so that Adam applies "
        "and saves NaN. Later ones it saves and exits with code 16, over a good checkpoint of "
        "the same iteration, and with objects that no restricted reader loads; switched off, it "
        "ends one rank in a traceback. A step that it runs again counts its tokens twice"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="the optimizer refuses a norm that is not finite, and the machine takes callbacks",
)


class StepRejected(Exception):
    """The rerun machine trusts a result of the step no more, on some rank; raised on all.

    Attributes:
        here: whether it is a result of this rank.
    """

    def __init__(self, here: bool) -> None:
        super().__init__(here)
        self.here = here


_restarted: Callable[[], None] | None = None


@contextmanager
def calling_on_rerun(restarted: Callable[[], None]) -> Iterator[None]:
    """Meanwhile call `restarted` on every rank before a step is run again."""
    global _restarted
    _restarted = restarted
    try:
        yield
    finally:
        _restarted = None


def install() -> None:
    """Judge a step where Megatron has its results, and before it applies them."""
    from megatron.core.optimizer.optimizer import ChainedOptimizer
    from megatron.core.rerun_state_machine import RerunStateMachine

    for owner, name, changed in (
        (RerunStateMachine, "should_run_forward_backward", _announcing),
        (RerunStateMachine, "should_checkpoint_and_exit", _rejecting),
        (RerunStateMachine, "validate_result", _without_raising),
        (ChainedOptimizer, "get_grad_norm", _noting),
        (ChainedOptimizer, "step_with_ready_grads", _refusing),
    ):
        setattr(owner, name, changed(getattr(owner, name)))


def _announcing(original: Callable[..., bool]) -> Callable[..., bool]:
    from megatron.core.rerun_state_machine import RerunState

    @functools.wraps(original)
    def should_run_forward_backward(self: Any, data_iterator: Any) -> bool:
        # Megatron trusts the first one blindly, since it could not be saved for another try.
        self.first_iteration_complete = True
        runs = original(self, data_iterator)
        if runs and self.state == RerunState.RERUNNING_IN_PLACE and _restarted is not None:
            _restarted()
        return runs

    return should_run_forward_backward


def _rejecting(original: Callable[..., Any]) -> Callable[..., Any]:
    from megatron.core.rerun_state_machine import RerunState

    @functools.wraps(original)
    def should_checkpoint_and_exit(self: Any) -> Any:
        result = original(self)
        _, ends, _ = result
        here = self.failed_validation_call is not None
        # It would be saved with the next checkpoint, whose reader does not know its class.
        self.failed_validation_call = self.initial_result = None
        if ends:
            self.state = RerunState.NOT_RUNNING_YET
            raise StepRejected(here)
        return result

    return should_checkpoint_and_exit


def _without_raising(original: Callable[..., Any]) -> Callable[..., Any]:
    """Where the machine is off: the norm over all ranks tells, so this one need not fail alone."""
    from megatron.core.rerun_state_machine import RerunMode

    @functools.wraps(original)
    def validate_result(self: Any, *args: Any, fatal: bool = True, **kwargs: Any) -> None:
        original(self, *args, fatal=fatal and self.mode != RerunMode.DISABLED, **kwargs)

    return validate_result


def _noting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_grad_norm(self: Any) -> float | None:
        norm = original(self)
        if norm is not None:
            # Of Transformer Engine's kernels it is a tensor, which would be read once more for each
            # use: clipping, the other ranks of the model, the log.
            norm = float(norm)
        self.norm_is_finite = norm is None or math.isfinite(norm)
        return norm

    return get_grad_norm


def _refusing(original: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(original)
    def step_with_ready_grads(self: Any) -> bool:
        return getattr(self, "norm_is_finite", True) and original(self)

    return step_with_ready_grads
