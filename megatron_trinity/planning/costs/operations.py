"""Kernels that would be launched, and bytes that collectives move: by part of a step.

An operation that torch dispatches is a launch, unless it makes a view, allocates, only reads
metadata or has an empty result. One over a list of tensors (`_foreach_`, `_fused_`) counts once.
What a kernel library splits further is not seen.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from megatron_trinity.planning.costs.places import Places

FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"),
    *("_unsafe_view", "_reshape_alias", "detach", "detach_", "alias", "set_", "lift_fresh", "lift"),
    *("is_same_size", "_local_scalar_dense", "sym_size", "sym_numel", "sym_stride"),
    *("unbind", "split", "split_with_sizes", "record_stream"),
    *("promote_types", "_record_function_enter_new", "_record_function_exit"),
}
"""Operations that launch nothing; a value that is read on the host is a copy, see `host_syncs`."""

COLLECTIVES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
}
"""torch's name of an operation, to that of the collective."""

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "_grouped_mm", "grouped_mm"}
"""Operations that are products of matrices."""

_SENT = {"all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
"""Number of the argument that is sent, where it is not the first."""


class OperationCounter(TorchDispatchMode):
    """Counts within it.

    Attributes:
        launches: by part and operation.
        collectives: by part and kind, bytes that a rank puts in: an all-to-all's include its own
            part, a reduce-scatter's are those of the whole.
        calls: by part, collectives.
    """

    def __init__(self, places: Places) -> None:
        super().__init__()
        self._places = places
        self.launches: Counter[tuple[str, str]] = Counter()
        self.collectives: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = function._schema.name.partition("::")
        there = on_host(args, kwargs)
        if namespace == "c10d":
            self._collective(name, args)
            if name == "alltoall_base_":
                args = _filled(*args)
        out = function(*args, **kwargs)
        free = namespace == "c10d" or name in FREE or function.is_view or there
        if not free and not _is_empty(out):
            self.launched(name)
        if there:
            mark_on_host(out)
        return out

    def launched(self, name: str, number: int = 1) -> None:
        """Count some."""
        self.launches[self._places.now(), name] += number

    def _collective(self, name: str, args: Any) -> None:
        kind = COLLECTIVES.get(name)
        if kind is None:  # a barrier, or groups' own business
            return
        sent = tree_leaves(args[_SENT.get(kind, 0)])
        size = sum(tensor.nbytes for tensor in sent if isinstance(tensor, Tensor))
        self.collectives[self._places.now(), kind] += size
        self.calls[self._places.now()] += 1

    def __enter__(self) -> OperationCounter:
        _active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _active.remove(self)


_active: list[OperationCounter] = []


def one_launch(
    name: str, function: Callable[..., Any], number: Callable[..., int] | None = None
) -> Callable[..., Any]:
    """`function`, which is one kernel on a GPU and several operations here.

    Args: number: how many kernels it is, from its arguments, if it is not one.
    """

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        for counter in _active:
            counter.launched(name, number(*args, **kwargs) if number else 1)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return counted


_host: set[int] = set()
"""Storages of tensors that would not be on the GPU."""


def mark_on_host(value: Any) -> Any:
    """These tensors would not be on the GPU: reading them waits for nothing."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            storage = leaf.untyped_storage()
            if storage._cdata not in _host:
                _host.add(storage._cdata)
                weakref.finalize(storage, _host.discard, storage._cdata)
    return value


def copy_on_host(tensor: Tensor) -> Tensor:
    """A copy that is there; no kernel makes it."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        copy: Tensor = mark_on_host(tensor.clone())
        return copy


def on_host(*values: Any) -> bool:
    """Whether all of some tensors would not be on the GPU; of none, False."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return bool(tensors) and all(t.untyped_storage()._cdata in _host for t in tensors)


def _is_empty(result: Any) -> bool:
    """Whether there is nothing to compute: torch launches nothing then."""
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return bool(tensors) and not any(tensor.numel() for tensor in tensors)


def _filled(
    received: Tensor, sent: Tensor, group: Any, received_counts: Any, sent_counts: Any, *rest: Any
) -> tuple[Any, ...]:
    """Ranks that are not there send what this one sends, over and over.

    Returns: the arguments of the call; a group of fake ranks takes none that sends nothing.
    """
    rows = torch.arange(len(received)) % max(len(sent), 1)
    received.copy_(sent[rows] if len(sent) else torch.zeros_like(received))
    if not len(sent):
        sent, sent_counts = received.clone(), received_counts
    return received, sent, group, received_counts, sent_counts, *rest
