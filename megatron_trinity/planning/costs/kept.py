"""Bytes that autograd keeps for the backward pass, by the part of a step that keeps them first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_trinity.planning.costs.places import Places


class KeptBytes:
    """Counts within it, each storage once, and none that holds one of `left_out`.

    What it has counted stays alive until it is gone, so that no storage takes the place of another.
    """

    def __init__(self, places: Places, left_out: Iterable[Tensor]) -> None:
        self._places = places
        self._known = {tensor.untyped_storage()._cdata for tensor in left_out}
        self._alive: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.kept: Counter[str] = Counter()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._alive.append(tensor)
            self.kept[self._places.now()] += storage.nbytes()
        return tensor

    def __enter__(self) -> KeptBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)
