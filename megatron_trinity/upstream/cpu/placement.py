"""Tensors asked for on a CUDA device are made on the CPU.

The functions of torch that take a `device` are wrapped, rather than watched by a
`TorchFunctionMode`: a mode is called for every torch operation (and only in the thread that
entered it), the wrappers only where a device can be named, in every thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.jit import _builtins
from torch.utils import _device

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="cpu-placement",
    symbols=(
        "torch.utils._device._device_constructors",
        "torch.Tensor.to",
        "torch.Tensor.type",
    ),
    reason=(
        'megatron-core writes `device="cuda"`, integer devices, `.cuda()` and `pin_memory` in '
        "some five hundred places, and compares `tensor.type()` with `'torch.cuda.FloatTensor'`"
    ),
    written_for="megatron-core 0.19.2, torch 2.13",
    remove_when="megatron-core asks the platform for its device instead of naming CUDA",
    when="without_cuda",
    after=("cpu-device",),
)


_CPU = torch.device("cpu")

# Functions with a `device` keyword that torch does not count as constructors.
_LIKE_CONSTRUCTORS = (
    "empty_like",
    "full_like",
    "ones_like",
    "rand_like",
    "randint_like",
    "randn_like",
    "zeros_like",
)
_TENSOR_CONSTRUCTORS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def is_cuda_device(device: Any) -> bool:
    """Whether `device`, in any of the forms that torch accepts, names a CUDA device."""
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


class CpuTypeName(str):
    """The name of a tensor type, on the CPU or meta, equal also to that of the same on CUDA."""

    def __eq__(self, other: object) -> bool:
        on_cpu = self.replace("torch.meta.", "torch.", 1)
        return str.__eq__(self, other) or str.__eq__(
            on_cpu.replace("torch.", "torch.cuda.", 1), other
        )

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with a CUDA `device=` keyword turned into the CPU, and no pinned memory."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            device = kwargs.get("device")
            if device is not None and is_cuda_device(device):
                kwargs["device"] = _CPU
            if "pin_memory" in kwargs:
                kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapper


def _wrap_constructors() -> None:
    # Cached by torch on first use, and compared by identity: it must hold the functions of torch,
    # or `with torch.device("meta"):` would no longer see the constructors.
    constructors = _device._device_constructors()
    names = [name for name in dir(torch) if any(getattr(torch, name) is c for c in constructors)]
    for name in (*names, *_LIKE_CONSTRUCTORS):
        original = getattr(torch, name)
        wrapper = _on_cpu(original)
        builtin = _builtins._find_builtin(original)
        if builtin is not None:
            _builtins._register_builtin(wrapper, builtin)
        setattr(torch, name, wrapper)


def _wrap_tensor_methods() -> None:
    for name in _TENSOR_CONSTRUCTORS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))

    original_to = torch.Tensor.to
    original_type = torch.Tensor.type

    @functools.wraps(original_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and is_cuda_device(args[0]):
            args = (_CPU, *args[1:])
        elif "device" in kwargs and is_cuda_device(kwargs["device"]):
            kwargs["device"] = _CPU
        return original_to(self, *args, **kwargs)

    @functools.wraps(torch.Tensor.cuda)
    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original_to(self, _CPU)

    @functools.wraps(torch.Tensor.pin_memory)
    def pin_memory(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    @functools.wraps(original_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original_type(self, *args, **kwargs)
        return CpuTypeName(result) if isinstance(result, str) else result

    torch.Tensor.to = to  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = cuda  # type: ignore[method-assign,assignment]
    torch.Tensor.pin_memory = pin_memory  # type: ignore[method-assign,assignment]
    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]


def install() -> None:
    """Wrap the constructors and the placing methods of torch."""
    _wrap_constructors()
    _wrap_tensor_methods()
