"""Numbers of eight bits: how a recipe scales values, and how they are rounded.

Pure, on plain tensors. Shapes: `[m, k]` a matrix, cut into tiles of `high` rows and `wide` columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

TILE = 128
RUN = 32
"""Values of MX formats that share a scale, a power of two in eight bits."""


def rounded(values: Tensor, eight: torch.dtype) -> Tensor:
    """fp32 to the nearest number of a format, ties to even, beyond its range to its largest."""
    largest = torch.finfo(eight).max
    return values.clamp(-largest, largest).to(eight)


def scale_of(largest: Tensor, eight: torch.dtype, power_of_two: bool, least: float = 0.0) -> Tensor:
    """What values up to `largest` are multiplied by to fill the range of a format.

    Args:
        power_of_two: down to the next one, so that scaling rounds nothing.
        least: what smaller ones count as.
    """
    largest = largest.float().clamp(min=least)
    # A number divided by a tensor would be its reciprocal, times the number: rounded twice.
    scale = torch.full_like(largest, torch.finfo(eight).max) / largest
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    scale = torch.where((largest == 0) | largest.isinf(), 1.0, scale)
    if power_of_two:
        exponent_alone = 0x7F800000
        scale = (scale.contiguous().view(torch.int32) & exponent_alone).view(torch.float32)
    return scale


def exact(values: Tensor) -> Tensor:
    """fp32 of eight bits: looked up, since torch's conversion is several times slower."""
    table = torch.arange(256, dtype=torch.uint8).view(values.dtype).float()
    return table.index_select(0, values.view(torch.uint8).flatten().int()).view(values.shape)


def in_tiles(
    matrix: Tensor,
    high: int,
    eight: torch.dtype,
    power_of_two: bool,
    least: float = 0.0,
    wide: int = TILE,
) -> tuple[Tensor, Tensor]:
    """Round each tile with a scale of its own.

    Returns: `[m, k]` of the format; `[m / high, k / wide]` fp32, what undoes the scales.
    """
    rows, columns = matrix.shape
    tiles = _tiles(matrix.float(), high, wide)
    largest = tiles.abs().amax(dim=3, keepdim=True).amax(dim=1, keepdim=True)
    scale = scale_of(largest, eight, power_of_two, least)
    values = rounded(tiles * scale, eight).flatten(2).flatten(0, 1)
    return values[:rows, :columns], 1.0 / scale[:, 0, :, 0]


def out_of_tiles(values: Tensor, inverse: Tensor, high: int, wide: int = TILE) -> Tensor:
    """fp32 of what `in_tiles` returned; of scales there may be more, for alignment."""
    rows, columns = values.shape
    tiles = _tiles(exact(values), high, wide)
    scales = inverse[: tiles.shape[0], None, : tiles.shape[2], None]
    return (tiles * scales).flatten(2).flatten(0, 1)[:rows, :columns]


def exponents(inverse: Tensor) -> Tensor:
    """uint8 of what undoes scales that are powers of two, as MX formats keep it (e8m0)."""
    return inverse.to(torch.float8_e8m0fnu).view(torch.uint8)


def powers(exponent: Tensor) -> Tensor:
    """fp32 of what `exponents` returned."""
    return exponent.view(torch.float8_e8m0fnu).float()


def _tiles(matrix: Tensor, high: int, wide: int) -> Tensor:
    """`[m, k]` to `[m / high, high, k / wide, wide]`, with zeros where there is no more."""
    rows, columns = matrix.shape
    if rows % high or columns % wide:
        matrix = pad(matrix, (0, -columns % wide, 0, -rows % high))
    return matrix.unflatten(0, (-1, high)).unflatten(2, (-1, wide))
