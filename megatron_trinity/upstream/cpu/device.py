"""Stand-ins for the device, streams and events of `torch.cuda`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="cpu-device",
    symbols=(
        "torch.cuda.current_device",
        "torch.cuda.Stream",
        "torch.cuda.nvtx.range_push",
    ),
    reason=(
        "megatron-core asks for the current device, waits on streams and synchronises "
        "everywhere; `device_count()` has to be above zero, or it builds no model-parallel "
        "groups. On the CPU every operation has ended when its call returns, so streams and "
        "events have nothing to do but exist"
    ),
    written_for="megatron-core 0.19.2, torch 2.13",
    remove_when="megatron-core goes through a platform interface that has a CPU side",
    when="without_cuda",
)


_CPU = torch.device("cpu")


class CpuStream:
    """A stream whose work is always done."""

    device = _CPU
    priority = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All work has ended."""
        return True

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        """An event that has already happened."""
        event = event or CpuEvent()
        event.record(self)
        return event

    def __enter__(self) -> CpuStream:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class CpuEvent:
    """An event that happens when it is recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        """Remember the time."""
        self._time = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """It has happened."""
        return True

    def elapsed_time(self, end: CpuEvent) -> float:
        """Milliseconds from this event to `end`."""
        return (end._time - self._time) * 1000.0


_STREAM = CpuStream()


def _current_device() -> torch.device:
    return _CPU


def _device_count() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _nothing(name: str) -> Callable[..., None]:
    """A function of its own that does nothing: torch._dynamo keeps a rule for each function of
    torch.cuda by identity, and refuses two rules for one function.
    """

    def nothing(*args: Any, **kwargs: Any) -> None:
        """Only matters on CUDA."""

    nothing.__name__ = name
    return nothing


def _current_stream(device: Any = None) -> CpuStream:
    return _STREAM


def _default_stream(device: Any = None) -> CpuStream:
    return _STREAM


def _stream_context(stream: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()  # one that can be entered again, as that of CUDA can


@contextlib.contextmanager
def _device_context(device: Any) -> Iterator[None]:
    yield


def _device_capability(device: Any = None) -> tuple[int, int]:
    # Below every threshold that megatron-core compares with (bf16 kernels, TE, FP8).
    return (0, 0)


def _device_name(device: Any = None) -> str:
    return "cpu"


def install() -> None:
    """Put the stand-ins into `torch.cuda`, in the place of functions that raise without CUDA."""
    stand_ins = {
        "Event": CpuEvent,
        "Stream": CpuStream,
        "current_device": _current_device,
        "current_stream": _current_stream,
        "default_stream": _default_stream,
        "device": _device_context,
        "device_count": _device_count,
        "get_device_capability": _device_capability,
        "get_device_name": _device_name,
        "stream": _stream_context,
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    for name in ("empty_cache", "ipc_collect", "set_device", "set_stream", "synchronize"):
        setattr(torch.cuda, name, _nothing(name))
    for name in ("mark", "range_pop", "range_push"):
        setattr(torch.cuda.nvtx, name, _nothing(name))
