"""Checkpoints of the bf16 optimizer when some parameters of the model are fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="float16-fp32-params",
    symbols=(
        "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params.state_dict",
        "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params.sharded_state_dict",
        "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params.load_state_dict",
    ),
    reason=(
        "`Float16OptimizerWithFloat16Params` trains fp32 parameters of a bf16 model (norm "
        "gains), but its state dicts number the parameters as if there were bf16 ones only, and "
        'saving fails ("Param id 69 does not match any model sharded param")'
    ),
    written_for="megatron-core 0.19.2",
    remove_when="the optimizer's state dicts count `fp32_from_fp32_groups`",
)


@contextmanager
def every_parameter(optimizer: Any) -> Iterator[None]:
    """Within it, an fp32 parameter counts as its own main copy, in its place among the others."""
    saved = optimizer.float16_groups, optimizer.fp32_from_float16_groups
    model_of_main = {
        id(main): model
        for models, mains in zip(*saved, strict=True)
        for model, main in zip(models, mains, strict=True)
    }
    mains = [list(group["params"]) for group in optimizer.optimizer.param_groups]
    optimizer.float16_groups = [
        [model_of_main.get(id(main), main) for main in group] for group in mains
    ]
    optimizer.fp32_from_float16_groups = mains
    try:
        yield
    finally:
        optimizer.float16_groups, optimizer.fp32_from_float16_groups = saved


def _counting_every_parameter(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_stub_optimizer or not any(self.fp32_from_fp32_groups):
            return method(self, *args, **kwargs)
        with every_parameter(self):
            return method(self, *args, **kwargs)

    return wrapped


def install() -> None:
    """Make the three methods that write and read state count every parameter."""
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params as Optimizer

    for name in ("state_dict", "sharded_state_dict", "load_state_dict"):
        setattr(Optimizer, name, _counting_every_parameter(getattr(Optimizer, name)))
