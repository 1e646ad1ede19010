"""Gradients of the first step, reduced once where the optimizer has instances."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_trinity.upstream.registry import Adaptation

_GROUP = "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup."

ADAPTATION = Adaptation(
    name="instance-grad-sync",
    symbols=(f"{_GROUP}start_grad_sync", f"{_GROUP}reset"),
    reason=(
        "in the first step with `--overlap-grad-reduce` a bucket that the pipeline's schedule has "
        "sent is sent once more where it is waited for, unless a handle says that it is on its "
        "way; with `--num-distributed-optimizer-instances` there is no handle, and sums of sums "
        "go into the update"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="`finish_grad_sync` knows without a handle whether a bucket has been sent",
)


def install() -> None:
    """Remember in each step which groups of buckets have been sent."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    _ParamAndGradBucketGroup.start_grad_sync = _once(_ParamAndGradBucketGroup.start_grad_sync)
    _ParamAndGradBucketGroup.reset = _forgetting(_ParamAndGradBucketGroup.reset)


def _once(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def start_grad_sync(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.is_first_batch and self.ddp_config.num_distributed_optimizer_instances > 1:
            if getattr(self, "is_sent", False):
                return
            self.is_sent = True
        original(self, *args, **kwargs)

    return start_grad_sync


def _forgetting(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def reset(self: Any) -> None:
        original(self)
        self.is_sent = False

    return reset
