"""The step counter of torch's Adam inside the distributed optimizer.

Three things go wrong in saving and resuming:
 - the counter is read from the states of parameters, and there are none before the first step, nor
   ever on a rank whose shard is empty: `assert len(steps) == 1` fails (also while loading, since
   the layout of what is to be loaded is taken from a fresh optimizer);
 - after loading, all parameters share one counter tensor, so each step counts once a parameter and
   Adam's bias correction is that of a much later step;
 - loading the parameters' states then overwrites the counter with the one of a fresh optimizer, or,
   in the format for every layout, which has no counter in them, fails with `KeyError: 'step'`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="distributed-adam-steps",
    symbols=(
        "megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE",
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.state_dict",
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.load_state_dict",
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
        "._set_main_param_and_optimizer_states",
    ),
    reason=(
        "without Transformer Engine or Apex the distributed optimizer runs torch's Adam, whose "
        "step counter is part of the state of each parameter; saving before the first step "
        "fails, and a resumed run counts wrongly"
    ),
    written_for="megatron-core 0.19.2",
    remove_when=(
        "`DistributedOptimizer.state_dict` takes an optimizer without state, and "
        "`load_state_dict` leaves each parameter with its own, loaded counter"
    ),
)


def _keep_own_counter(optimizer: Any) -> None:
    """Count the steps of a torch optimizer also where it holds no parameters."""
    if optimizer.optimizer is None or hasattr(optimizer, "steps_taken"):
        return
    optimizer.steps_taken = 0

    def count(*unused: Any) -> None:
        optimizer.steps_taken += 1

    optimizer.optimizer.register_step_post_hook(count)


def install() -> None:
    """Wrap construction, `state_dict` and `load_state_dict` of the distributed optimizer."""
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    original_init = DistributedOptimizer.__init__
    original_state_dict = DistributedOptimizer.state_dict
    original_load_state_dict = DistributedOptimizer.load_state_dict
    original_set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(original_init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original_init(self, *args, **kwargs)
        _keep_own_counter(self)

    @functools.wraps(original_state_dict)
    def state_dict(self: Any) -> dict[str, Any]:
        if self.optimizer.state:
            return original_state_dict(self)
        inner: dict[str, Any] = self.optimizer.state_dict()
        groups = inner["param_groups"]
        for group in groups:
            del group["params"]
            group["step"] = float(self.steps_taken)
        result: dict[str, Any] = {"optimizer": {"param_groups": groups}}
        if self.grad_scaler:
            result["grad_scaler"] = self.grad_scaler.state_dict()
        return result

    @functools.wraps(original_load_state_dict)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        steps = {g["step"] for g in state_dict["optimizer"]["param_groups"] if "step" in g}
        original_load_state_dict(self, state_dict)
        if steps:
            self.steps_taken = int(max(steps))
            for state in self.optimizer.state.values():
                state["step"] = torch.tensor(float(self.steps_taken))
        # The counter is a state of each parameter, and a copy in the group would go stale.
        for group in self.optimizer.param_groups:
            group.pop("step", None)

    @functools.wraps(original_set_states)
    def _set_main_param_and_optimizer_states(
        self: Any, model_param: torch.Tensor, tensors: dict[str, Any]
    ) -> None:
        # What is not a tensor is skipped: the counter comes from the group, in every format.
        original_set_states(self, model_param, {**tensors, "step": None})

    DistributedOptimizer.__init__ = __init__
    DistributedOptimizer._set_main_param_and_optimizer_states = _set_main_param_and_optimizer_states
    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
