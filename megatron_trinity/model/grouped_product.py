"""A product of matrices for each expert, at once by torch's grouped product, or in turn.

Shapes: t rows sorted by group, e groups, i features in, o features out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Product = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""`[t, i]` rows and for each group `[o, i]` to `[t, o]`."""

ALIGNMENT = 16  # bytes, of every address that the kernel reads tiles from
MAJOR_CAPABILITIES = (9, 10)
"""Devices for which torch has a kernel: elsewhere its grouped product is a loop that waits for the
numbers of rows on the host."""


def product_by_group(tokens: Tensor, counts: Tensor, widths: Sequence[int]) -> Product:
    """The product to take for these rows.

    Args:
        tokens: `[t, i]`, on the device and of the dtype of the products to come.
        counts: `[e]` integers that sum up to t, on the host or on the device.
        widths: every number of features in or out of those products.
    """
    aligned = all(width * tokens.element_size() % ALIGNMENT == 0 for width in widths)
    if tokens.shape[0] and aligned and has_kernel(tokens.device, tokens.dtype):
        ends = counts.cumsum(0).to(tokens.device, torch.int32, non_blocking=True)
        return partial(grouped_product, ends)
    sizes = counts.tolist()
    return lambda rows, weights: grouped_linear(rows, sizes, weights)


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's grouped product is one kernel there."""
    return device.type == "cuda" and dtype == torch.bfloat16 and _is_of_capability(device)


@cache
def _is_of_capability(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] in MAJOR_CAPABILITIES


def grouped_product(ends: Tensor, tokens: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Multiply each group of rows by its own matrix, without a look at the sizes of the groups.

    The sizes need no padding: every product here has its groups side by side in a dimension that is
    not the contiguous one, so that a group begins at an aligned address wherever it begins.

    Args:
        ends: `[e]` int32 on the device of `tokens`: rows up to the end of each group, t at last.
        tokens: `[t, i]`, sorted by group.
        weights: for each group, `[o, i]`.
    Returns: `[t, o]`.
    """
    result: Tensor = _GroupedProduct.apply(tokens, ends, *weights)
    return result


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        tokens = tokens.contiguous()
        ctx.save_for_backward(tokens, ends, *weights)
        return F.grouped_mm(tokens, stacked(weights).transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, ends, *weights = ctx.saved_tensors
        gradient = gradient.contiguous()
        # A stack that was kept would be a second copy of all experts of all layers.
        of_tokens = F.grouped_mm(gradient, stacked(weights), offs=ends)
        of_weights = F.grouped_mm(gradient.t(), tokens, offs=ends)  # zeros for a group without rows
        return of_tokens, None, *of_weights.unbind()


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """`[e, o, i]`: a view where the weights lie evenly spaced in one storage, else one copy."""
    if len(weights) == 1:
        return weights[0].unsqueeze(0)
    first, second = weights[:2]
    step = second.storage_offset() - first.storage_offset()
    evenly = step >= first.numel() and all(
        weight.is_contiguous()
        and weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and weight.storage_offset() == first.storage_offset() + number * step
        for number, weight in enumerate(weights)
    )
    aligned = step * first.element_size() % ALIGNMENT == 0 == first.data_ptr() % ALIGNMENT
    if not (evenly and aligned):
        return torch.stack(tuple(weights))
    return first.as_strided((len(weights), *first.shape), (step, *first.stride()))


def grouped_linear(tokens: Tensor, counts: Sequence[int], weights: Sequence[Tensor]) -> Tensor:
    """Multiply each group of rows by its own matrix, one after another.

    Args:
        tokens: `[t, i]`, sorted by group.
        counts: rows of each group, t in all.
        weights: for each group, `[o, i]`.
    Returns: `[t, o]`.
    """
    result: Tensor = _GroupedLinear.apply(tokens, counts, *weights)
    return result


class _GroupedLinear(torch.autograd.Function):
    """A product for each group, all into one tensor, in both directions."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, counts: Sequence[int], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, *weights)
        ctx.counts = counts
        output = tokens.new_empty(tokens.shape[0], weights[0].shape[0])
        parts = zip(output.split(counts), tokens.split(counts), weights, strict=True)
        for out, rows, weight in parts:
            torch.mm(rows, weight.t(), out=out)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, *weights = ctx.saved_tensors
        of_tokens = torch.empty_like(tokens)
        of_weights = []
        for of_rows, rows, weight, of_output in zip(
            of_tokens.split(ctx.counts),
            tokens.split(ctx.counts),
            weights,
            gradient.split(ctx.counts),
            strict=True,
        ):
            torch.mm(of_output, weight, out=of_rows)
            # Zeros, not None, for an expert without tokens, as Megatron's linear layers give.
            of_weights.append(of_output.t() @ rows)
        return of_tokens, None, *of_weights
