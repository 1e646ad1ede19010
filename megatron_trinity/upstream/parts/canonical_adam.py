"""The forms in which Megatron's optimizers around Adam hold state, and the canonical one.

Each tensor is `optimizer.state.NAME.KEY`, NAME one of `fp32_param`, `exp_avg` and `exp_avg_sq` and
KEY that of its weight. What is not a tensor is the number of steps: rates and weight decay are
those of the run, and the schedule has its own state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from torch import Tensor

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Of the formats of the distributed optimizer the one with canonical names."""
WEIGHTS = "optimizer.state.fp32_param"
WEIGHTS_OF_DISTRIBUTED = "optimizer.state.param"


def sharded_state_dict(
    self: Any,
    model_sharded_state_dict: dict[str, Any],
    is_loading: bool = False,
    metadata: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The number of steps, and the tensors of all optimizers of the chain, numbered.

    What is to be loaded is remembered with its place until `load_state_dict`.
    """
    self._synchronize_steps()
    states = [
        _native(optimizer, model_sharded_state_dict, is_loading, {**(metadata or {}), **SHARDING})
        for optimizer in _with_parameters(self)
    ]
    if is_loading:
        self.places_of_state = states
    steps = max((_steps_of(state) for state in states), default=0)
    return {"step": steps, "state": dict(enumerate(_sharded(states)))}


def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
    """Take over what was loaded into the tensors of the last `sharded_state_dict`."""
    loaded = state_dict["state"]
    tensors = (loaded[number] for number in range(len(loaded)))
    states = native_states(self, tensors, state_dict["step"])
    for optimizer, state in zip(_with_parameters(self), states, strict=True):
        weights = state.pop(WEIGHTS, {})
        optimizer.load_state_dict(state)
        with torch.no_grad():
            for number, weight in weights.items():
                optimizer.get_parameters()[number].copy_(weight)
    self._synchronize_steps()


def native_states(chain: Any, tensors: Iterator[Tensor], steps: int) -> list[dict[str, Any]]:
    """What each optimizer's own `load_state_dict` takes, and fp32 weights under `WEIGHTS`.

    Args:
        tensors: in the order of the last `sharded_state_dict` of the chain.
    """
    states: list[dict[str, Any]]
    states, chain.places_of_state = chain.places_of_state, None
    for optimizer, state in zip(_with_parameters(chain), states, strict=True):
        dict_list_map_inplace(partial(_loaded, tensors), state)
        _set_steps(optimizer, state, steps)
    return states


def or_native(original: Callable[..., None]) -> Callable[..., None]:
    """State of the `torch` format, which is one rank's, is loaded as ever."""

    @functools.wraps(original)
    def load(self: Any, state_dict: Any) -> None:
        if getattr(self, "places_of_state", None) is None:
            original(self, state_dict)
        else:
            load_state_dict(self, state_dict)

    return load


def _with_parameters(chain: Any) -> Iterator[Any]:
    return (o for o in chain.chained_optimizers if not getattr(o, "is_stub_optimizer", False))


def _native(
    optimizer: Any, model: dict[str, Any], is_loading: bool, metadata: dict[str, Any]
) -> dict[str, Any]:
    """The optimizer's own sharded state, with fp32 weights in every precision."""
    state: dict[str, Any] = optimizer.sharded_state_dict(model, is_loading, metadata=metadata)
    if isinstance(optimizer, FP32Optimizer):
        parameters = optimizer.get_parameters()
        places = get_param_id_to_sharded_param_map(model, parameters)
        state[WEIGHTS] = {
            number: make_sharded_optimizer_tensor(
                places[number],
                # The model's own weights, which these are, are loaded meanwhile.
                torch.empty_like(parameter) if is_loading else parameter.detach(),
                prefix=WEIGHTS,
            )
            for number, parameter in enumerate(parameters)
        }
    for leaf in _sharded(state):
        if leaf.key.startswith(WEIGHTS_OF_DISTRIBUTED + "."):
            leaf.key = WEIGHTS + leaf.key.removeprefix(WEIGHTS_OF_DISTRIBUTED)
    return state


def _sharded(state: Any) -> Iterator[Any]:
    return (leaf for leaf in nested_values(state) if isinstance(leaf, ShardedBase))


def _loaded(tensors: Iterator[Tensor], leaf: Any) -> Any:
    if isinstance(leaf, LocalNonpersistentObject):
        return leaf.unwrap()
    return next(tensors) if isinstance(leaf, ShardedBase) else leaf


def _steps_of(state: dict[str, Any]) -> int:
    inner = state.get("optimizer", state)
    of_groups = [group["step"] for group in inner["param_groups"] if "step" in group]
    return int(max([*of_groups, inner.get("state", {}).get("common_step", 0)]))


def _set_steps(optimizer: Any, state: dict[str, Any], steps: int) -> None:
    """Where the optimizer looks for them: torch's Adam counts for each parameter."""
    inner = state.get("optimizer", state)
    if isinstance(optimizer, DistributedOptimizer) or distrib_optimizer.HAVE_APEX_OR_TE:
        for group in inner["param_groups"]:
            group["step"] = steps
    else:
        inner["state"]["common_step"] = torch.tensor(float(steps))
