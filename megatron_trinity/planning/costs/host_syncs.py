"""Where the host would wait for a GPU: by place in the source and part of a step."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from megatron_trinity.planning.costs.operations import copy_on_host, mark_on_host, on_host
from megatron_trinity.planning.costs.places import Places

READS = {
    *("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__"),
    *("cpu", "numpy", "__array__", "__format__", "__repr__", "is_nonzero", "equal", "allclose"),
    *("nonzero", "argwhere", "masked_select", "bincount", "unique", "unique_consecutive"),
}
"""Functions of torch that read values of their tensors, if only to know how large a result is."""

MAKES = {"tensor", "as_tensor", "new_tensor"}
"""Functions that copy values of the host to a device, from memory that is not pinned."""

HOST = "cpu"
"""Where a value is asked to stay by name; the current device, here a CPU as well, has no name."""

_NOT_HERE = ("/megatron_trinity/planning/costs/", "/megatron_trinity/upstream/cpu/")
_OPTIMIZER_OF_TORCH = "/torch/optim/"
_ROOTS = ("/megatron_trinity/", "/megatron/", "/benchmarks/", "/tests/")


@dataclass(frozen=True, order=True)
class HostSync:
    """A place where the host waits.

    Attributes:
        where: file and line.
        what: that is called there.
        part: of the step, see `Places`.
    """

    where: str
    what: str
    part: str


class HostSyncs(TorchFunctionMode):
    """Counts within it what would block on a GPU, as if all tensors were there.

    All but those that are `on_host`: copied to the host already, or made without a device. Copies
    from the host count too, since torch waits for them unless memory is pinned. Stand-ins of
    `torch.cuda` count where they wait.

    Attributes:
        found: place to how many times.
    """

    def __init__(self, places: Places) -> None:
        super().__init__()
        self._places = places
        self._undo: list[tuple[Any, str, Any]] = []
        self.found: Counter[HostSync] = Counter()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if waits := self._waits(name, args, kwargs):
            self.note(name, int(waits))
        if name == "cpu":
            return copy_on_host(args[0])  # which torch would return as it is
        out = function(*args, **kwargs)
        if _stays_on_host(name, args, kwargs, out):
            mark_on_host(out)
        return out

    def note(self, what: str, times: int = 1) -> None:
        """Count here."""
        where = _caller()
        if where is not None:
            self.found[HostSync(where, what, self._places.now())] += times

    def _waits(self, name: str, args: Any, kwargs: Any) -> int:
        """How many times."""
        if name in MAKES:
            copied = name == "new_tensor" and not on_host(args[0])
            if name == "as_tensor" and isinstance(args[0], Tensor):
                return 0  # it is there
            # A list of tensors is read one by one.
            read = () if name == "new_tensor" else tree_leaves(args[0])
            numbers = sum(isinstance(leaf, Tensor) and not on_host(leaf) for leaf in read)
            return numbers + (copied or kwargs.get("device") not in (None, HOST))
        if on_host(args, kwargs):
            return False
        if name == "repeat_interleave":
            counts = args[1] if len(args) > 1 else kwargs.get("repeats", args[0])
            return isinstance(counts, Tensor) and kwargs.get("output_size") is None
        if name == "where":
            return len(args) + len(kwargs) == 1
        if name in ("__getitem__", "__setitem__"):
            return _index_waits(args[1])
        return name in READS

    def __enter__(self) -> HostSyncs:
        from megatron_trinity.upstream.cpu.device import CpuEvent, CpuStream

        for owner, name, what in (
            (torch.cuda, "synchronize", "cuda.synchronize"),
            (torch.distributed, "barrier", "barrier"),
            (CpuEvent, "synchronize", "event.synchronize"),
            (CpuStream, "synchronize", "stream.synchronize"),
        ):
            self._undo.append((owner, name, getattr(owner, name)))
            setattr(owner, name, lambda *_, what=what, **__: self.note(what))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        while self._undo:
            setattr(*self._undo.pop())


def _index_waits(index: Any) -> bool:
    """A mask has as many elements as it has; a list of numbers is copied to the device."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(part, list) or (isinstance(part, Tensor) and part.dtype == torch.bool)
        for part in parts
    )


def _stays_on_host(name: str, args: Any, kwargs: Any, out: Any) -> bool:
    """Whether a tensor was made of no other one and on no device."""
    on_device = kwargs.get("device") not in (None, HOST)
    if not isinstance(out, Tensor) or on_device or name.startswith("_"):
        return False
    return not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))


def _caller() -> str | None:
    """File and line of the code, of this project or of Megatron, that is to blame.

    None for torch's optimizers, which keep the number of steps on the host.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = Path(frame.f_code.co_filename).as_posix()
        if _OPTIMIZER_OF_TORCH in name:
            return None
        if not any(part in name for part in _NOT_HERE):
            for root in _ROOTS:
                if root in name:
                    short = root.strip("/") + "/" + name.rpartition(root)[2]
                    return f"{short}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
