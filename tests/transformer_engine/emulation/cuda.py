"""What Transformer Engine hears when it asks torch about CUDA: a Hopper is there.

Only its own modules hear so, and Megatron's check of the flags of its kernels. Everything else,
this project and megatron-core among it, is on the CPU as always, with the stand-ins of
`megatron_trinity.upstream.cpu`.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

CAPABILITY = (9, 0)
_PROPERTIES = types.SimpleNamespace(
    name="emulated",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    total_memory=80 << 30,
)
_ANSWERS: dict[str, Any] = {
    "is_available": True,
    "current_device": 0,
    "device_count": 1,
    "get_device_capability": CAPABILITY,
    "get_device_properties": _PROPERTIES,
    "is_current_stream_capturing": False,
}

_CHECK_OF_FLAGS = "megatron.training.arguments"


def pretend_cuda() -> None:
    """Answer Transformer Engine. To be called when the stand-ins of the CPU are in place."""
    quantization: Any = importlib.import_module("transformer_engine.pytorch.quantization")
    # It also looks at the version of CUDA that torch was built for, and here that is none.
    quantization._FP8_BLOCK_SCALING_SUPPORT = (True, "")
    quantization._MXFP8_SUPPORT = (True, "")  # of Blackwell, all else of which is as on Hopper
    for name, answer in _ANSWERS.items():
        setattr(torch.cuda, name, _answering(getattr(torch.cuda, name), answer))
    together = torch.distributed._coalescing_manager

    def coalescing(*args: Any, **kwargs: Any) -> Any:
        return _OneByOne() if _asked_by_transformer_engine() else together(*args, **kwargs)

    setattr(torch.distributed, "_coalescing_manager", coalescing)
    true_one: Any = torch._C.TensorBase.is_cuda
    setattr(
        torch.Tensor,
        "is_cuda",
        property(lambda tensor: _asked_by_transformer_engine() or true_one.__get__(tensor)),
    )


class _OneByOne(contextlib.AbstractContextManager["_OneByOne"]):
    """Collectives that NCCL would send together; gloo has no such thing, and does each at once."""

    def __exit__(self, *error: object) -> None: ...

    def wait(self) -> None: ...


def _answering(original: Callable[..., Any], answer: Any) -> Callable[..., Any]:
    def asked(*args: Any, **kwargs: Any) -> Any:
        return answer if _asked_by_transformer_engine() else original(*args, **kwargs)

    asked.__name__ = original.__name__
    return asked


def _asked_by_transformer_engine() -> bool:
    """Whether the function two calls up is one of its own."""
    asking = str(sys._getframe(2).f_globals.get("__name__", ""))
    return asking.partition(".")[0] == "transformer_engine" or asking == _CHECK_OF_FLAGS
