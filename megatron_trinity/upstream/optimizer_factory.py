"""An optimizer, and a learning-rate schedule, that megatron-core does not make."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="optimizer-factory",
    symbols=(
        "megatron.training.training.get_megatron_optimizer",
        "megatron.core.optimizer_param_scheduler.OptimizerParamScheduler.get_lr",
    ),
    reason=(
        "`get_megatron_optimizer` knows its own optimizers alone. Its registry of emerging "
        "optimizers takes a torch optimizer class, but makes one of them for each kind of "
        "parameter, tells it neither where a fused tensor's matrices are nor who else holds "
        "them, and wraps it in an optimizer whose state is for one data-parallel size. Its "
        "schedule starts with the run and cannot start anew"
    ),
    written_for="megatron-core 0.19.2",
    remove_when=(
        "the registry takes a whole `MegatronOptimizer`, and the schedule takes where it starts"
    ),
)


OptimizerFactory = Callable[[Any, Sequence[Any]], Any]

_make_optimizer: OptimizerFactory | None = None
_schedule_start = 0


def set_optimizer_factory(factory: OptimizerFactory | None) -> None:
    """Make optimizers with `factory(config, model_chunks)` from now on; None for Megatron's own."""
    global _make_optimizer
    _make_optimizer = factory


def set_schedule_start(samples: int) -> None:
    """Let the next run's schedule of the learning rate begin after so many samples."""
    global _schedule_start
    _schedule_start = samples


def install() -> None:
    """Ask the factory, if one is set, and let the schedule start where it was told to."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.training import training

    training.get_megatron_optimizer = _with_factory(training.get_megatron_optimizer)
    OptimizerParamScheduler.get_lr = _with_start(OptimizerParamScheduler.get_lr)


def _with_factory(get_megatron_optimizer: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_megatron_optimizer)
    def get_optimizer(config: Any, model_chunks: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        if _make_optimizer is None:
            return get_megatron_optimizer(config, model_chunks, *args, **kwargs)
        return _make_optimizer(config, model_chunks)

    return get_optimizer


def _with_start(get_lr: Callable[..., float]) -> Callable[..., float]:
    @functools.wraps(get_lr)
    def get_lr_from_start(scheduler: Any, param_group: dict[str, Any]) -> float:
        total = scheduler.num_steps
        scheduler.num_steps = max(0, total - _schedule_start)
        try:
            return get_lr(scheduler, param_group)
        finally:
            scheduler.num_steps = total

    return get_lr_from_start
