"""Bytes that torch's operations hold, counted and not measured."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make within it, until they are freed.

    Attributes:
        now: bytes of those that are alive.
        peak: the most that there have been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self._note(tree_leaves((args, kwargs)), counted=False)
        out = function(*args, **kwargs)
        self._note(tree_leaves(out), counted=True)
        return out

    def _note(self, leaves: Iterable[Any], counted: bool) -> None:
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            key, size = storage._cdata, storage.nbytes() * counted
            if key not in self._known:
                self._known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class SavedBytes:
    """Counts what autograd saves within it for the backward pass, each storage once."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._sizes[storage._cdata] = storage.nbytes()
        return tensor

    def without(self, *tensors: Tensor) -> int:
        """Bytes, but for those of `tensors`."""
        left_out = {tensor.untyped_storage()._cdata for tensor in tensors}
        return sum(size for key, size in self._sizes.items() if key not in left_out)
