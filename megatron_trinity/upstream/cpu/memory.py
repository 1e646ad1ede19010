"""Memory statistics of the process in the place of those of a CUDA device."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="cpu-memory",
    symbols=(
        "torch.cuda.memory_stats",
        "torch.cuda.get_device_properties",
    ),
    reason=(
        "megatron-core logs `torch.cuda.memory_*` and plans by `get_device_properties`; on the "
        "CPU the numbers that mean the same are the resident memory of the process and the "
        "memory of the machine"
    ),
    written_for="megatron-core 0.19.2, torch 2.13",
    remove_when="megatron-core asks a platform interface for memory",
    when="without_cuda",
)


_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class CpuProperties:
    """The fields of `torch.cuda.get_device_properties` that make sense for a machine."""

    name: str
    total_memory: int
    multi_processor_count: int
    major: int = 0
    minor: int = 0


def _status_bytes(field: str) -> int | None:
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def _getrusage_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Bytes of this process that are in memory now."""
    return _status_bytes("VmRSS") or _getrusage_peak()


def peak_resident_bytes() -> int:
    """Most bytes of this process that were in memory at once, since the last reset."""
    return max(_status_bytes("VmHWM") or _getrusage_peak(), resident_bytes())


def reset_peak() -> None:
    """Start the peak anew, where the system lets a process do so."""
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")


def machine_bytes() -> int:
    """Bytes of memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _memory_stats(device: Any = None) -> dict[str, int]:
    current, peak = resident_bytes(), peak_resident_bytes()
    # The system's allocator keeps no counts.
    stats = {"num_alloc_retries": 0, "num_ooms": 0, "allocation.all.current": 0}
    for kind in ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes"):
        stats[f"{kind}.all.current"] = current
        stats[f"{kind}.all.peak"] = peak
    return stats


def _mem_get_info(device: Any = None) -> tuple[int, int]:
    total = machine_bytes()
    try:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        free = total - resident_bytes()
    return free, total


def _properties(device: Any = None) -> CpuProperties:
    return CpuProperties("cpu", machine_bytes(), os.cpu_count() or 1)


def install() -> None:
    """Put the process' numbers into `torch.cuda`."""
    # A function object for each name: torch._dynamo keeps its rules by identity.
    stand_ins: dict[str, Callable[..., Any]] = {
        "device_memory_used": lambda device=None: resident_bytes(),
        "get_device_properties": _properties,
        "max_memory_allocated": lambda device=None: peak_resident_bytes(),
        "max_memory_reserved": lambda device=None: peak_resident_bytes(),
        "mem_get_info": _mem_get_info,
        "memory_allocated": lambda device=None: resident_bytes(),
        "memory_reserved": lambda device=None: resident_bytes(),
        "memory_stats": _memory_stats,
        "reset_max_memory_allocated": lambda device=None: reset_peak(),
        "reset_peak_memory_stats": lambda device=None: reset_peak(),
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
        if hasattr(torch.cuda.memory, name):
            setattr(torch.cuda.memory, name, stand_in)
