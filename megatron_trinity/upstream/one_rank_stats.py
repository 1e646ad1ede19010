"""Where a model is on one rank, what its ranks have to agree on is known already."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_trinity.upstream.registry import Adaptation, rebind

_UTILS = "megatron.training.utils.common_utils."

ADAPTATION = Adaptation(
    name="one-rank-stats",
    symbols=(
        f"{_UTILS}reduce_max_stat_across_model_parallel_group",
        f"{_UTILS}logical_and_across_model_parallel_group",
    ),
    reason=(
        "without tensor and pipeline parallelism the norm, the learning rate and whether a step "
        "was applied still go to the device and come back: the host waits eight times a step for "
        "numbers that it has"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="the two functions return at once for a group of one rank",
)


def install() -> None:
    """Let the two functions return at once there."""
    from megatron.training.utils import common_utils

    for name, alone in (
        ("reduce_max_stat_across_model_parallel_group", as_reduced),
        ("logical_and_across_model_parallel_group", lambda agreed: agreed is True),
    ):
        original = getattr(common_utils, name)
        rebind(original, _unless_alone(original, alone))


def as_reduced(stat: float | None) -> float | None:
    """The same in the fp32 that it would come back in; -1 stands for None there."""
    value = -1.0 if stat is None else float(torch.tensor(stat, dtype=torch.float32))
    return None if value == -1.0 else value


def _unless_alone(original: Callable[..., Any], alone: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def agreed(value: Any, group: Any = None) -> Any:
        from megatron.core import parallel_state

        ranks = parallel_state.get_model_parallel_group() if group is None else group
        on_device = isinstance(value, torch.Tensor)
        return original(value, group) if ranks.size() > 1 or on_device else alone(value)

    return agreed
