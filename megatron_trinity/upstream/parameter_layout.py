"""A layout of parameters in Megatron's buffers that megatron-core does not make."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="parameter-layout",
    symbols=(
        "megatron.training.models.dist_utils._ddp_wrap",
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.compute_full_param_layout",
    ),
    reason=(
        "its `DistributedDataParallel` takes any layout, but the function that builds models asks "
        "the distributed optimizer alone for one: shards end anywhere in a matrix, where Muon has "
        "its matrices whole or cut between rows"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="`build_distributed_models` takes a `FullParamLayout` or a function that makes one",
)

_make_layout: Callable[..., Any] | None = None


def set_parameter_layout(function: Callable[..., Any] | None) -> None:
    """Lay parameters out with a function of the same arguments; None for Megatron's own."""
    global _make_layout
    _make_layout = function


def install() -> None:
    """Ask the function, if one is set."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.compute_full_param_layout

    @functools.wraps(original)
    def compute_full_param_layout(*args: Any, **kwargs: Any) -> Any:
        return (_make_layout or original)(*args, **kwargs)

    DistributedOptimizer.compute_full_param_layout = staticmethod(compute_full_param_layout)
