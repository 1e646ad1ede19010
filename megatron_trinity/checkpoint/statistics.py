"""Norms of a checkpoint's tensors, and of the differences of two checkpoints, slice by slice."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_trinity.checkpoint.conversion.rows import Shape
from megatron_trinity.checkpoint.conversion.slices import not_finite, slices
from megatron_trinity.checkpoint.conversion.tasks import ByteCounter, Report
from megatron_trinity.checkpoint.inspect import nbytes
from megatron_trinity.checkpoint.torch_dist.read import TorchDistCheckpoint, TorchDistTensors
from megatron_trinity.progress import Progress, SilentProgress

SLICE_SHARE = 16
"""Memory has room for so many slices in fp32: two are read, and computed with in fp64."""

Show = Callable[[int | None], Progress]


@dataclass(frozen=True)
class TensorStatistics:
    """Of one tensor.

    Attributes:
        norm: Frobenius norm of the values that are finite.
        largest: largest magnitude of those.
        nonfinite: how many are not.
    """

    norm: float
    largest: float
    nonfinite: int


@dataclass(frozen=True)
class TensorDifference:
    """Of two tensors of one shape.

    Attributes:
        largest: largest magnitude of the difference; NaN where a value is not finite in one alone.
        relative: Frobenius norm of the difference over that of the first tensor.
    """

    largest: float
    relative: float


@dataclass(frozen=True)
class Difference:
    """What two checkpoints do not have alike.

    Attributes:
        only_first, only_second: tensors that one of them has.
        forms: tensor to dtypes and shapes, where they differ.
        tensors: tensors of one shape whose values differ, if only in a bit.
        same: number of tensors that are bitwise alike.
        args: argument to its two values, for those that differ; None is also for none.
    """

    only_first: list[str]
    only_second: list[str]
    forms: dict[str, tuple[str, str]]
    tensors: dict[str, TensorDifference]
    same: int
    args: dict[str, tuple[Any, Any]]

    @property
    def tensors_differ(self) -> bool:
        """Whether anything but arguments differs."""
        return bool(self.only_first or self.only_second or self.forms or self.tensors)


def tensor_statistics(
    stored: TorchDistTensors, memory_bytes: int, show: Show = SilentProgress
) -> dict[str, TensorStatistics]:
    """Read every tensor.

    Raises:
        TrinityError: one cannot be read.
    """
    keys = stored.tensor_keys()
    found = {}
    with show(sum(nbytes(stored, key) for key in keys)) as progress:
        report = ByteCounter(0, progress)
        for key in keys:
            squares, largest, nonfinite = 0.0, 0.0, 0
            for part in _slices(stored.shape(key), memory_bytes):
                read = stored.rows(key, part.row, part.rows)
                report(read.nbytes)
                values = read.double()
                bad = not_finite(values)
                values = values[torch.isfinite(values)] if bad else values
                nonfinite += bad
                squares += _norm(values) ** 2
                largest = max(largest, _largest(values))
            found[key] = TensorStatistics(math.sqrt(squares), largest, nonfinite)
    return found


def compare(
    first: TorchDistCheckpoint,
    second: TorchDistCheckpoint,
    memory_bytes: int,
    show: Show = SilentProgress,
) -> Difference:
    """Read two checkpoints side by side, of any layouts.

    Raises:
        TrinityError: a tensor cannot be read.
    """
    here, there = set(first.tensor_keys()), set(second.tensor_keys())
    common = sorted(here & there)
    forms = {
        key: (_form(first, key), _form(second, key))
        for key in common
        if _form(first, key) != _form(second, key)
    }
    comparable = [key for key in common if first.shape(key) == second.shape(key)]
    differing = {}
    with show(sum(nbytes(first, key) for key in comparable)) as progress:
        report = ByteCounter(0, progress)
        for key in comparable:
            difference = _difference(first, second, key, memory_bytes, report)
            if difference is not None:
                differing[key] = difference
    return Difference(
        only_first=sorted(here - there),
        only_second=sorted(there - here),
        forms=forms,
        tensors=differing,
        same=len(comparable) - len(differing.keys() | forms.keys() & set(comparable)),
        args=_args_that_differ(first.args, second.args),
    )


def _difference(
    first: TorchDistTensors,
    second: TorchDistTensors,
    key: str,
    memory_bytes: int,
    report: Report,
) -> TensorDifference | None:
    """None if the values are alike bit by bit, or after the wider dtype took in the other."""
    squares, norm, largest, alike = 0.0, 0.0, 0.0, True
    for part in _slices(first.shape(key), memory_bytes):
        a, b = (stored.rows(key, part.row, part.rows) for stored in (first, second))
        report(a.nbytes)
        norm += _norm(a.double()) ** 2
        if _same_bits(a, b):
            continue
        alike = False
        difference = a.double() - b.double()
        squares += _norm(difference) ** 2
        # `max` would lose a NaN, and torch's default dtype digits.
        both = torch.tensor([largest, _largest(difference)], dtype=torch.float64)
        largest = both.amax().item()
    if alike:
        return None
    relative = math.sqrt(squares / norm) if norm else math.copysign(math.inf, squares)
    return TensorDifference(largest, relative if squares else 0.0)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(dtype).view(torch.uint8), b.to(dtype).view(torch.uint8))


def _args_that_differ(first: Namespace, second: Namespace) -> dict[str, tuple[Any, Any]]:
    here, there = vars(first), vars(second)
    return {
        name: (here.get(name), there.get(name))
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    }


def _slices(shape: Shape, memory_bytes: int) -> Sequence[Any]:
    return list(slices(shape, torch.float32.itemsize, memory_bytes // SLICE_SHARE))


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values))


def _largest(values: Tensor) -> float:
    return float(values.abs().amax()) if values.numel() else 0.0


def _form(stored: TorchDistTensors, key: str) -> str:
    dtype = str(stored.dtype(key)).removeprefix("torch.")
    return f"{dtype} {list(stored.shape(key))}"
