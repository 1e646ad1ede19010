"""The checks of all gradient buffers for NaN and infinity are read at once, behind the backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trinity.upstream.registry import Adaptation

_MACHINE = "megatron.core.rerun_state_machine.RerunStateMachine."
_GROUP = "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup."

ADAPTATION = Adaptation(
    name="gradient-checks",
    symbols=(
        f"{_GROUP}check_grads",
        f"{_MACHINE}should_run_forward_backward",
        f"{_MACHINE}validate_result",
        f"{_MACHINE}_reduce_any",
    ),
    reason=(
        "the host waits for the device twice for the norm of every gradient buffer, in the middle "
        "of the backward pass where they overlap it, and twice more to learn whether another rank "
        "has a bad one; and then for the norm of all"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="the rerun machine judges the results of a step when its backward has ended",
    after=("rejected-steps",),
)

_noted: list[tuple[str, Tensor]] = []
"""Message and norm `[]` of this rank's buffers in the step under way."""


class NormOwner(Protocol):
    """An optimizer that needs the norm of all gradients, and can have it read with the others."""

    def gradient_squares(self) -> Tensor:
        """`[k]` fp32 on the device, collective: what the norm is made of."""

    def squares_read(self, squares: Sequence[float] | None) -> None:
        """Take them for the step that follows; None where there are none any more."""


_owner: NormOwner | None = None


@contextmanager
def reading_for(optimizer: Any) -> Iterator[None]:
    """Meanwhile read what `optimizer` makes its norm of as well, if it is a `NormOwner`."""
    global _owner
    if not hasattr(optimizer, "gradient_squares"):
        yield
        return
    _owner = optimizer
    try:
        yield
    finally:
        _owner = None
        optimizer.squares_read(None)


def install() -> None:
    """Note norms where Megatron checks them, and judge them when it asks whether to run again."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
    from megatron.core.rerun_state_machine import RerunStateMachine

    setattr(_ParamAndGradBucketGroup, "check_grads", _noting(_ParamAndGradBucketGroup.check_grads))
    judging = _judging(RerunStateMachine.should_run_forward_backward)
    setattr(RerunStateMachine, "should_run_forward_backward", judging)


def _noting(check_grads: Callable[..., None]) -> Callable[..., None]:
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine

    @functools.wraps(check_grads)
    def note(self: Any, check_for_nan_or_inf: bool, check_for_large: bool) -> None:
        validates = get_rerun_state_machine().mode == RerunMode.VALIDATE_RESULTS
        if check_for_large or not check_for_nan_or_inf or not validates:
            check_grads(self, check_for_nan_or_inf, check_for_large)
            return
        norms = torch._foreach_norm([bucket.grad_data for bucket in self.buckets])
        _noted.extend(
            (f"bucket #{number} in backward pass before data-parallel communication", norm)
            for number, norm in enumerate(norms)
        )

    return note


def _judging(should_run: Callable[..., bool]) -> Callable[..., bool]:
    from megatron.core.rerun_state_machine import RerunMode, RerunState

    @functools.wraps(should_run)
    def judge_first(self: Any, data_iterator: Any) -> bool:
        if self.mode != RerunMode.VALIDATE_RESULTS or self.state == RerunState.NOT_RUNNING_YET:
            _noted.clear()
            return should_run(self, data_iterator)
        squares = None if _owner is None else _owner.gradient_squares()
        norms, bad, read = read_norms([norm for _, norm in _noted], self.rerun_requested, squares)
        if _owner is not None:
            _owner.squares_read(read)
        for (where, _), norm in zip(_noted, norms, strict=True):
            self.validate_result(
                result=norm,
                rejection_func=lambda value: not value.isfinite(),
                message=f"found NaN or Inf in local grad norm for {where}",
                tolerance=0.001,  # Megatron's: attention may not be deterministic
                fatal=True,
            )
        _noted.clear()
        if self.state != RerunState.INITIAL_RUN or _injects(self):
            return should_run(self, data_iterator)
        self._reduce_any = lambda _: bad
        try:
            return should_run(self, data_iterator)
        finally:
            del self._reduce_any

    return judge_first


def read_norms(
    norms: list[Tensor], bad_here: bool, along: Tensor | None = None
) -> tuple[list[Tensor], bool, list[float]]:
    """This rank's norms on the host, and whether any rank is bad or has one that is not finite.

    Collective over all ranks; the host waits once, for `along`, `[k]` fp32, as well.
    """
    nothing = torch.zeros(1, device=torch.cuda.current_device())
    own = torch.stack(norms).float() if norms else nothing[:0]
    # 0 if all are finite, else NaN: which a sum over ranks hands on.
    flag = (own * 0.0).sum().view(1) if norms else nothing
    if bad_here:
        flag = flag.fill_(math.nan)
    dist.all_reduce(flag)
    read = torch.cat([own, flag, nothing[:0] if along is None else along]).cpu()
    values, anywhere, others = read.tensor_split([len(own), len(own) + 1])
    return list(values), math.isnan(anywhere), others.tolist()


def _injects(machine: Any) -> bool:
    """Whether errors are made up on the host, of which the device knows nothing."""
    return bool(machine.error_injector.error_injection_rate)
