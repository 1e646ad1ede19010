"""A step that is not finite or not reproducible ends the run in one line, before it is applied."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from megatron_trinity.errors import StepError
from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="rerun-exit",
    symbols=(
        "megatron.core.rerun_state_machine.RerunStateMachine.should_checkpoint_and_exit",
        "megatron.core.optimizer.optimizer.ChainedOptimizer.get_grad_norm",
    ),
    reason=(
        "the rerun machine lets the first iteration after a start through, so that Adam applies "
        "and saves NaN. Later ones it saves and exits with code 16, over a good checkpoint of "
        "the same iteration, and with objects that no restricted reader loads"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="the optimizer checks its gradient norm, and the rerun machine saves data alone",
)

REMEDY = "nothing of it is applied or saved; start again from the checkpoint before it"


def check_norm(norm: float) -> None:
    """Refuse to apply gradients of this global norm, the same on all ranks.

    Raises:
        StepError: it is not finite.
    """
    if not math.isfinite(norm):
        from megatron.training import get_args

        iteration = get_args().curr_iteration + 1
        raise StepError(f"the gradient norm of iteration {iteration} is {norm}; {REMEDY}")


def install() -> None:
    """Check the norm where Megatron has computed it, and end the run in the machine's place."""
    from megatron.core.optimizer.optimizer import ChainedOptimizer
    from megatron.core.rerun_state_machine import RerunStateMachine

    ChainedOptimizer.get_grad_norm = _checked(ChainedOptimizer.get_grad_norm)
    original = RerunStateMachine.should_checkpoint_and_exit
    RerunStateMachine.should_checkpoint_and_exit = _ending(original)


def _checked(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_grad_norm(self: Any) -> Any:
        norm = original(self)
        check_norm(float(norm))
        return norm

    return get_grad_norm


def _ending(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def should_checkpoint_and_exit(self: Any) -> Any:
        result = original(self)
        _, ends, _ = result
        if ends:
            raise StepError(
                f"iteration {self.current_iteration + 1} has a result that is not finite, or "
                f"another one when it is run again; {REMEDY}"
            )
        return result

    return should_checkpoint_and_exit
