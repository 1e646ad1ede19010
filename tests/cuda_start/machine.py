"""A process that takes its machine for one with an H100; its tensors stay on the CPU.

The stand-ins of `megatron_trinity/upstream/cpu/` for the device, its memory, placement and
generator are put in place as they are without CUDA, and then CUDA is reported present, so that
nothing is adapted for a machine without: start-up, arguments and models take the way that they
take on a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOPPER = (9, 0)
MEMORY = 80 * 1024**3


@dataclass(frozen=True)
class Properties:
    """What is asked of `torch.cuda.get_device_properties`."""

    name: str
    major: int
    minor: int
    total_memory: int = MEMORY
    multi_processor_count: int = 132
    warp_size: int = 32
    L2_cache_size: int = 50 * 1024**2


STAND_INS = Path(__file__).parent / "stand_ins"


def become(packages: Sequence[str], capability: tuple[int, int] = HOPPER) -> None:
    """Make this process one on a machine with CUDA and `packages`, with megatron-core adapted.

    Args:
        packages: of `stand_ins/`, by the names of their folders.
    """
    sys.path[:0] = [str(STAND_INS / package) for package in packages]
    report_cuda(capability)

    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()
    stand_in_for_devices()


def load_on(packages: Sequence[str]) -> None:
    """Become one, and import what a rank of a pool needs."""
    from tests.distributed.worker import load_megatron

    become(packages)
    load_megatron()


def report_cuda(capability: tuple[int, int] = HOPPER) -> None:
    """To be called first, before `adapt_megatron()` and any import of megatron."""
    # Functions that are compiled on a GPU are run as they are.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch

    from megatron_trinity.upstream.cpu import device, gloo_devices, memory, placement

    # Without CUDA by now: these make what would raise there into something.
    for stand_in in (device, memory, placement, gloo_devices):
        stand_in.install()
    properties = Properties("NVIDIA H100 80GB HBM3", *capability)
    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
    }
    for name, function in cuda.items():
        setattr(torch.cuda, name, function)
    # What torch itself does with an accelerator needs a real one.
    setattr(torch.accelerator, "is_available", lambda: False)
    setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    _join_over_gloo()


def _join_over_gloo() -> None:
    """Groups that are asked for over NCCL are made over gloo."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    start, new_group = dist.init_process_group, dist.new_group

    def over_gloo(backend: str | None) -> str | None:
        return "gloo" if backend is not None and "nccl" in backend else backend

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        start(over_gloo(backend or "nccl"), *args, **kwargs)

    def group(*args: Any, **kwargs: Any) -> Any:
        if "backend" in kwargs:
            kwargs["backend"] = over_gloo(kwargs["backend"])
        kwargs.pop("pg_options", None)  # NCCL's
        return new_group(*args, **kwargs)

    for module in (dist, c10d):
        setattr(module, "init_process_group", init_process_group)
        setattr(module, "new_group", group)


def stand_in_for_devices() -> None:
    """What megatron-core has of its own for tensors on a GPU; behind `adapt_megatron()`."""
    from megatron_trinity.upstream.cpu import moe_dispatch, rng, uneven_collectives

    for stand_in in (rng, moe_dispatch, uneven_collectives):
        stand_in.install()
