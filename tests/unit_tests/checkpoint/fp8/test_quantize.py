"""Quantising by blocks, against a loop over blocks and a search in a table of e4m3."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_trinity.checkpoint.fp8.quantize import E4M3, dequantize, quantize, scale_shape

Numbers = NDArray[np.float64]
SHAPES = [(128, 128), (256, 384), (1, 1), (130, 5), (300, 257), (127, 129)]
SQUARE = (128, 128)
ROW = (1, 0)
"""Stands for one row with all columns of a matrix."""


def block_of(block: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    return block[0], block[1] or shape[1]


def e4m3_table() -> Numbers:
    """The 127 finite magnitudes by code: 4 bits of exponent (bias 7), 3 of mantissa."""
    values = []
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values.append(normal if exponent else mantissa / 8 * 2.0**-6)
    return np.array(values)


TABLE = e4m3_table()


def rounded(values: Numbers) -> Numbers:
    """The nearest e4m3 values; of two as near, the one with the even code."""
    distances = np.abs(TABLE - np.abs(values)[..., None])
    code = distances.argmin(axis=-1)  # the lower one of two
    above = np.minimum(code + 1, len(TABLE) - 1)[..., None]
    tie = np.take_along_axis(distances, above, -1)[..., 0] == distances.min(axis=-1)
    code = np.where(tie & (code % 2 == 1), code + 1, code)
    nearest: Numbers = np.copysign(TABLE[code], values)
    return nearest


def by_loop(matrix: Tensor, block: tuple[int, int]) -> tuple[Numbers, NDArray[np.float32]]:
    source = matrix.float().numpy()
    (rows, columns), (down, across) = source.shape, block
    values = np.zeros(source.shape)
    scales = np.zeros((math.ceil(rows / down), math.ceil(columns / across)), dtype=np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            box = (
                slice(down * i, down * i + down),
                slice(across * j, across * j + across),
            )
            largest = np.abs(source[box]).max()
            scales[i, j] = largest / np.float32(448) if largest > 0 else 1
            quotients = source[box] / scales[i, j]
            values[box] = rounded(quotients.astype(np.float64))
    return values, scales


def noise(*shape: int) -> Tensor:
    """Of very different sizes from row to row."""
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = torch.logspace(-6, 2, shape[0])[torch.randperm(shape[0], generator=generator)]
    return torch.randn(shape, generator=generator) * sizes[:, None]


def test_the_format_is_the_tables() -> None:
    codes = torch.arange(127, dtype=torch.uint8)
    assert codes.view(E4M3).double().tolist() == TABLE.tolist()
    assert TABLE.max() == 448


def spread(scale: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """The scale of each value, in fp32."""
    wide = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [SQUARE, ROW, (3, 50)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_what_a_loop_over_blocks_gives(
    shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype
) -> None:
    matrix = noise(*shape).to(dtype)
    block = block_of(block, shape)
    values, scales = by_loop(matrix, block)
    fp8, scale = quantize(matrix, block)
    assert (fp8.dtype, scale.dtype) == (E4M3, torch.float32)
    assert fp8.is_contiguous()
    assert scale.shape == scale_shape(shape, block) == scales.shape
    assert np.array_equal(scale.numpy(), scales)
    assert np.array_equal(fp8.double().numpy(), values)
    found = dequantize(fp8, scale, block)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(values).float() * spread(scale, block, found.shape))


@pytest.mark.parametrize("shape", [(7, 5), (2, 64), (1, 1)])
def test_a_block_of_a_row_has_a_scale_a_row(shape: tuple[int, int]) -> None:
    assert scale_shape(shape, block_of(ROW, shape)) == (shape[0], 1)


def assert_within_e4m3(
    found: Tensor, source: Tensor, scale: Tensor, block: tuple[int, int]
) -> None:
    """Each value is at most half a step away.

    Between 2^e and 2^(e+1) steps are 2^(e-3): half of one is 1/17 of the value that lies half a
    step above 2^e, and less of any other. Below 2^-6, in units of the scale, steps are 2^-9. The
    division and the multiplication by the scale round as fp32 does.
    """
    exact = source.double()
    smallest = spread(scale, block, source.shape).double() * 2**-10
    allowed = torch.maximum(exact.abs() / 17, smallest)
    rounding = exact.abs() * 2**-22
    assert ((found.double() - exact).abs() <= allowed + rounding).all()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [SQUARE, ROW], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_value_is_further_away_than_half_a_step(
    shape: tuple[int, int], block: tuple[int, int], scale_dtype: torch.dtype
) -> None:
    matrix = noise(*shape)
    block = block_of(block, shape)
    fp8, scale = quantize(matrix, block, scale_dtype)
    assert_within_e4m3(dequantize(fp8, scale, block), matrix, scale, block)


def test_values_are_rounded_with_the_scale_as_it_is_stored() -> None:
    matrix = noise(300, 257)
    row = block_of(ROW, (300, 257))
    _, exact = quantize(matrix, row)
    fp8, scale = quantize(matrix, row, torch.bfloat16)
    assert torch.equal(scale, exact.bfloat16())
    assert (scale.float() < exact).any()
    assert (scale.float() > exact).any()
    quotients = (matrix / scale.float()).double().numpy()
    assert np.abs(quotients).max() > 448
    assert np.array_equal(fp8.double().numpy(), rounded(quotients))


def test_half_a_step_is_reached() -> None:
    matrix = torch.tensor([[448.0, 17.0, -17.0, 1.5 * 2**-9, 2**-10]])
    fp8, scale = quantize(matrix, SQUARE)
    assert scale.item() == 1
    assert fp8.float().tolist() == [[448, 16, -16, 2**-8, 0]]
    assert_within_e4m3(dequantize(fp8, scale, SQUARE), matrix, scale, SQUARE)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("largest", [0.037, 1.0, 3e5, 3e38, 1e-30])
def test_the_largest_value_of_a_block_becomes_448(sign: int, largest: float) -> None:
    matrix = torch.full((200, 200), 1e-3 * largest)
    matrix[150, 17] = sign * largest
    fp8, scale = quantize(matrix, SQUARE)
    assert fp8[150, 17].item() == sign * 448
    assert fp8[0].float().tolist() == [448.0] * 200, "the other blocks have scales of their own"
    assert fp8.float().abs().max() == 448
    assert_within_e4m3(dequantize(fp8, scale, SQUARE), matrix, scale, SQUARE)


def test_a_block_of_zeros_has_the_scale_1() -> None:
    matrix = noise(256, 256)
    matrix[:128, 128:] = 0
    fp8, scale = quantize(matrix, SQUARE)
    assert scale[0, 1].item() == 1
    found = dequantize(fp8, scale, SQUARE)
    assert torch.equal(found[:128, 128:], torch.zeros(128, 128))
    assert (scale != 1).sum() == 3
    fp8, scale = quantize(torch.zeros(3, 130), SQUARE)
    assert scale.tolist() == [[1.0, 1.0]]
    assert not fp8.float().any()


def test_values_too_small_for_a_scale_become_zeros() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        fp8, scale = quantize(torch.full((2, 2), 1e-44), SQUARE, dtype)
        assert scale.item() == torch.finfo(torch.float32).tiny
        assert fp8.float().tolist() == [[0.0, 0.0], [0.0, 0.0]]
