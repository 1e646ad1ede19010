"""Matrices in FP8 by blocks: e4m3 values, and one scale for each block.

A matrix is its values times the scales of their blocks: the inverse of what the matrix was
multiplied by.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_trinity.checkpoint.conversion.rows import Shape

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def scale_shape(shape: Shape, block: Shape) -> Shape:
    """Blocks of a matrix of `shape` by rows and columns; those at its ends may be smaller."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def quantize(
    matrix: Tensor, block: Shape, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Round a matrix to e4m3, with the largest magnitude of each block becoming 448.

    A block of zeros has the scale 1.

    Args:
        matrix: `[rows, columns]`, finite.
        block: rows and columns of a block.
        scale_dtype: type of the scales, fp32 or bf16. Values are rounded with the scales as they
            are in that type.

    Returns:
        The values `[rows, columns]` in e4m3, and the scales, of the shape that `scale_shape` says.
    """
    blocks = _blocks(matrix.float(), block)
    largest = blocks.abs().amax(dim=(1, 3))
    # Not smaller than a normal number, with which a division is exact to a rounding.
    exact = torch.where(largest > 0, (largest / LARGEST).clamp(min=_SMALLEST_SCALE), 1.0)
    scale = exact.to(scale_dtype)
    # A scale that bf16 rounds down gives 450 at most, and up to 464 the nearest e4m3 is 448.
    fp8 = (blocks / scale.float()[:, None, :, None]).to(E4M3)
    return _matrix(fp8, matrix.shape).contiguous(), scale


def dequantize(fp8: Tensor, scale: Tensor, block: Shape) -> Tensor:
    """The matrix `[rows, columns]`, in fp32, that values and scales stand for."""
    return _matrix(_blocks(fp8.float(), block) * scale.float()[:, None, :, None], fp8.shape)


def _blocks(matrix: Tensor, block: Shape) -> Tensor:
    """`[blocks, rows, blocks, columns]`, with zeros beyond the ends of the matrix."""
    rows, columns = matrix.shape
    down, across = scale_shape((rows, columns), block)
    padded = pad(matrix, (0, across * block[1] - columns, 0, down * block[0] - rows))
    return padded.view(down, block[0], across, block[1])


def _matrix(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Undo `_blocks`."""
    rows, columns = shape
    return blocks.flatten(2).flatten(0, 1)[:rows, :columns]
