"""Matrices in FP8 by blocks: e4m3 values, and one fp32 scale for each block of 128 x 128.

A matrix is its values times the scales of their blocks. The scale is `weight_scale_inv` to
transformers and vLLM: the inverse of what the matrix was multiplied by.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_trinity.checkpoint.hf_mapping import Shape

BLOCK = 128
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def scale_shape(shape: Shape) -> Shape:
    """Blocks of a matrix of `shape` by rows and columns; those at its ends may be smaller."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def quantize_blocks(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to e4m3, with the largest magnitude of each block becoming 448.

    A block of zeros has the scale 1.

    Args:
        matrix: `[rows, columns]`, finite.

    Returns:
        The values `[rows, columns]` in e4m3, and the scales `[ceil(rows / 128),
        ceil(columns / 128)]` in fp32.
    """
    blocks = _blocks(matrix.float())
    largest = blocks.abs().amax(dim=(1, 3))
    # Not smaller than a normal number, with which a division is exact to a rounding.
    scale_inv = torch.where(largest > 0, (largest / LARGEST).clamp(min=_SMALLEST_SCALE), 1.0)
    fp8 = (blocks / scale_inv[:, None, :, None]).to(E4M3)
    return _matrix(fp8, matrix.shape).contiguous(), scale_inv


def dequantize_blocks(fp8: Tensor, scale_inv: Tensor) -> Tensor:
    """The matrix `[rows, columns]`, in fp32, that values and scales stand for."""
    return _matrix(_blocks(fp8.float()) * scale_inv[:, None, :, None], fp8.shape)


def _blocks(matrix: Tensor) -> Tensor:
    """`[blocks, 128, blocks, 128]`, with zeros beyond the ends of the matrix."""
    rows, columns = matrix.shape
    blocks_down, blocks_across = scale_shape((rows, columns))
    padded = pad(matrix, (0, blocks_across * BLOCK - columns, 0, blocks_down * BLOCK - rows))
    return padded.view(blocks_down, BLOCK, blocks_across, BLOCK)


def _matrix(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Undo `_blocks`."""
    rows, columns = shape
    return blocks.flatten(2).flatten(0, 1)[:rows, :columns]
