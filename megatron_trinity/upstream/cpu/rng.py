"""The CPU generator in the place of the CUDA one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from megatron_trinity.errors import TrinityError
from megatron_trinity.upstream.registry import Adaptation, rebind

ADAPTATION = Adaptation(
    name="cpu-rng",
    symbols=(
        "megatron.core.tensor_parallel.random._get_cuda_rng_state",
        "megatron.core.tensor_parallel.random._set_cuda_rng_state",
        "megatron.core.tensor_parallel.random.CudaRNGStatesTracker.add",
        "megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork",
        "megatron.core.tensor_parallel.random.model_parallel_cuda_manual_seed",
    ),
    reason=(
        "parameters are initialised and dropout is drawn under named states of the CUDA "
        "generator (`CudaRNGStatesTracker`). Without CUDA the operations draw from torch's CPU "
        "generator, so its state is the one that has to be seeded, forked, saved and restored"
    ),
    written_for="megatron-core 0.19.2, torch 2.13",
    remove_when="megatron-core's tracker takes the generator of the platform",
    when="without_cuda",
    after=("cpu-jit",),
)


def _get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    if graph_safe:
        raise TrinityError("a generator safe for CUDA graphs was asked for on a CPU")
    return torch.get_rng_state()


def _set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    if graph_safe:
        raise TrinityError("a generator safe for CUDA graphs was asked for on a CPU")
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def _fork(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """Run with the state `name`, keep what it becomes, and go back to the state before.

    Upstream's also reports draws from the CPU generator as a mistake; here they are the purpose.
    """
    if name not in self.states_:
        raise RuntimeError(f"rng state {name} is not added")
    outer_name, outer_state = self._current_state_name, torch.get_rng_state()
    if outer_name != "default-rng":
        self.states_[outer_name] = outer_state
    torch.set_rng_state(self.states_[name])
    self._current_state_name = name
    try:
        yield
    finally:
        self.states_[name] = torch.get_rng_state()
        # An inner fork of the same name may have moved the outer state on.
        torch.set_rng_state(self.states_.get(outer_name, outer_state))
        self._current_state_name = outer_name


def install() -> None:
    """Seed, save and restore the CPU generator wherever the CUDA one is meant."""
    from megatron.core.tensor_parallel import random as megatron_random

    for module in (torch.cuda, torch.cuda.random):
        setattr(module, "get_rng_state", _get_state)
        setattr(module, "set_rng_state", _set_state)
        setattr(module, "manual_seed", _manual_seed)
    rebind(megatron_random._get_cuda_rng_state, _get_state)
    rebind(megatron_random._set_cuda_rng_state, _set_state)
    megatron_random.CudaRNGStatesTracker.fork = _fork
