"""The gloo process groups of a process share its network devices."""

from __future__ import annotations

import functools
import os
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo, Store

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="cpu-gloo-devices",
    symbols=(
        "torch.distributed.ProcessGroupGloo.__init__",
        "torch.distributed.ProcessGroupGloo.create_device",
        "torch.distributed.ProcessGroupGloo.create_default_device",
        "torch.distributed.ProcessGroupGloo._Options",
    ),
    reason=(
        "torch gives each group a device of its own, whose thread wakes up a hundred times a "
        "second. Megatron makes some twenty groups a rank; eight ranks that do nothing keep two "
        "cores busy"
    ),
    written_for="megatron-core 0.19.2, torch 2.13",
    remove_when="torch shares devices, or gloo's threads sleep until there is something to do",
    when="without_cuda",
)


@functools.cache
def _devices(interfaces: str) -> list[Any]:
    """Those that torch would make for a group: one for each interface that is named, or one."""
    names = [name for name in interfaces.split(",") if name]
    if not names:
        return [ProcessGroupGloo.create_default_device()]
    return [ProcessGroupGloo.create_device(interface=name) for name in names]


def install() -> None:
    """Give new groups the same devices, unless their maker chose some."""
    original = ProcessGroupGloo.__init__

    @functools.wraps(original)
    def __init__(
        self: ProcessGroupGloo,
        store: Store,
        rank: int,
        size: int,
        options: Any = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        if options is None:
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = _devices(os.environ.get("GLOO_SOCKET_IFNAME", ""))
            options._threads = 2 * len(options._devices)
            options._timeout = timeout
        original(self, store, rank, size, options)

    setattr(ProcessGroupGloo, "__init__", __init__)
