"""Tensors of eight bits, as Transformer Engine's quantizers ask for them.

On Hopper a product reads both factors along the axis that it sums over, so that a tensor is kept
twice: by rows, and turned (last axis first) by columns. Tiles of 128 x 128 are the same in both;
rows of 128 and columns of 128 have scales of their own. So have the runs of 32 of mxfp8, whose copy
by columns is not turned: Blackwell reads along either axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.emulation.eight_bits import (
    RUN,
    TILE,
    exact,
    exponents,
    in_tiles,
    out_of_tiles,
    powers,
    rounded,
    scale_of,
)
from tests.transformer_engine.emulation.enumerations import torch_dtype
from tests.transformer_engine.emulation.extension import emulates

# Attribute of a quantized tensor to the argument that makes it.
_OF_TENSOR = {"_data": "data", "_transpose": "data_transpose", "_scale_inv": "fp8_scale_inv"}
_OF_TILES = {
    name: name[1:]
    for name in (
        "_rowwise_data",
        "_rowwise_scale_inv",
        "_columnwise_data",
        "_columnwise_scale_inv",
    )
}


def _kinds() -> Any:
    from transformer_engine.pytorch import tensor

    return tensor


@emulates
def create_empty_quantized_tensor(
    quantizer: Any,
    shape: Sequence[int],
    dtype: Any,
    device: Any = None,
    pin_memory: bool = False,
) -> Any:
    """With the parts that the quantizer is to fill."""
    te, shape = _kinds(), tuple(shape)
    more: dict[str, Any] = {}
    if isinstance(quantizer, te.Float8BlockQuantizer):
        kinds = te.Float8BlockwiseQTensorStorage, te.Float8BlockwiseQTensor
        names, specs = _OF_TILES, quantizer.inner_tensor_specs(shape)
        more["is_2D_scaled"] = quantizer.block_scaling_dim == 2
    elif isinstance(quantizer, te.MXFP8Quantizer) and not quantizer.with_2d_quantization:
        kinds = te.MXFP8TensorStorage, te.MXFP8Tensor
        names, specs = _OF_TILES, quantizer.inner_tensor_specs(shape)
        # In which order a product reads scales is not emulated.
        more["with_gemm_swizzled_scales"] = quantizer.optimize_for_gemm
    elif isinstance(quantizer, te.Float8Quantizer | te.Float8CurrentScalingQuantizer):
        kinds = te.Float8TensorStorage, te.Float8Tensor
        names, specs = _OF_TENSOR, _parts_of_tensor(quantizer, shape)
    else:
        raise NotImplementedError(f"{type(quantizer).__name__} is not emulated")
    for attribute, argument in names.items():
        size, kind = specs.get(attribute, (None, None))
        more[argument] = None if size is None else torch.empty(size, dtype=kind, device="cpu")
    more |= {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    fake = dtype if isinstance(dtype, torch.dtype) else torch_dtype(dtype)
    if quantizer.internal:
        return kinds[0](fake_dtype=fake, **more)
    return kinds[1](shape=shape, dtype=fake, device=torch.device("cpu"), **more)


def _parts_of_tensor(quantizer: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    parts: dict[str, Any] = {"_scale_inv": ((1,), torch.float32)}
    if quantizer.rowwise_usage:
        parts["_data"] = (shape, torch.uint8)
    if quantizer.columnwise_usage:
        parts["_transpose"] = ((*shape[-1:], *shape[:-1]), torch.uint8)
    return parts


@emulates
def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """Round a tensor, into `output` if there is one; not where `noop` is 1."""
    if output is None:
        output = create_empty_quantized_tensor(quantizer, tensor.shape, tensor.dtype)
    if noop is not None and noop.item() == 1:
        return output
    values = tensor.detach().contiguous()
    if isinstance(quantizer, _kinds().Float8BlockQuantizer):
        _fill_tiles(values, quantizer, output)
    elif isinstance(quantizer, _kinds().MXFP8Quantizer):
        _fill_runs(values, quantizer, output)
    else:
        _fill_tensor(values, quantizer, output)
    return output


def _fill_tensor(values: Tensor, quantizer: Any, output: Any) -> None:
    """One scale for all: from the largest value, or the given one, and the largest is told."""
    eight = torch_dtype(quantizer.dtype)
    largest = values.abs().amax().float() if values.numel() else torch.zeros(())
    if isinstance(quantizer, _kinds().Float8Quantizer):
        scale = quantizer.scale.float().reshape(())
        quantizer.amax.copy_(quantizer.amax.maximum(largest))
    else:
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(
                largest,
                op=torch.distributed.ReduceOp.MAX,
                group=quantizer._canonicalized_amax_reduction_group(),
            )
        scale = scale_of(largest, eight, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    bits = rounded(values.float() * scale, eight).view(torch.uint8)
    output._scale_inv.copy_(1.0 / scale)
    if output._data is not None:
        output._data.copy_(bits)
    if output._transpose is not None:
        output._transpose.copy_(bits.movedim(-1, 0))
        output._transpose_invalid = False


def _fill_tiles(values: Tensor, quantizer: Any, output: Any) -> None:
    square = quantizer.block_scaling_dim == 2
    rows = values.reshape(-1, values.shape[-1])
    for data, inverse, matrix in (
        (output._rowwise_data, output._rowwise_scale_inv, rows),
        (output._columnwise_data, output._columnwise_scale_inv, rows.t()),
    ):
        if data is None:
            continue
        quantized, scales = in_tiles(
            matrix,
            TILE if square else 1,
            torch_dtype(quantizer.dtype),
            quantizer.force_pow_2_scales,
            quantizer.amax_epsilon,
        )
        data.copy_(quantized.view(torch.uint8).reshape(data.shape))
        scales = scales if square else scales.t()
        _put(inverse, scales)


def _fill_runs(values: Tensor, quantizer: Any, output: Any) -> None:
    rows = values.reshape(-1, values.shape[-1])
    eight = torch_dtype(quantizer.dtype)
    if output._rowwise_data is not None:
        quantized, inverse = in_tiles(rows, 1, eight, True, wide=RUN)
        output._rowwise_data.copy_(quantized.view(torch.uint8).view(values.shape))
        _put(output._rowwise_scale_inv, exponents(inverse))
    if output._columnwise_data is not None:
        quantized, inverse = in_tiles(rows.t(), 1, eight, True, wide=RUN)
        output._columnwise_data.copy_(quantized.view(torch.uint8).t().reshape(values.shape))
        _put(output._columnwise_scale_inv, exponents(inverse).t())


def _put(target: Tensor, scales: Tensor) -> None:
    """Into the corner; what there is more of is for alignment."""
    target.zero_()
    target[: scales.shape[0], : scales.shape[1]] = scales


@emulates
def dequantize(input: Any, otype: Any) -> Tensor:
    """What a tensor of eight bits stands for."""
    name = "_rowwise_data" if hasattr(input, "_rowwise_data") else "_data"
    return operand(input, columnwise=getattr(input, name) is None).to(torch_dtype(otype))


@emulates
def fp8_transpose(input: Tensor, dtype: Any, out: Tensor | None = None) -> Tensor:
    """The last axis first."""
    turned = input.movedim(-1, 0).contiguous()
    return turned if out is None else out.copy_(turned)


@emulates
def split_quantize(
    tensor: Tensor,
    split_sections: Sequence[int],
    quantizer_list: Sequence[Any],
    disable_bulk_allocation: bool = False,
) -> list[Any]:
    """Each run of rows by a quantizer of its own."""
    parts = tensor.split(list(split_sections))
    return [quantize(*each) for each in zip(parts, quantizer_list, strict=True)]


def format_of(tensor: Any) -> torch.dtype:
    """The type of the numbers that a product would read."""
    eight = getattr(tensor, "_fp8_dtype", None)
    return tensor.dtype if eight is None else torch_dtype(eight)


def operand(tensor: Any, columnwise: bool) -> Tensor:
    """What a product reads of a factor: itself, or fp32 of the copy for the axis it sums over.

    Raises:
        RuntimeError: a tensor of eight bits has no such copy.
    """
    if getattr(tensor, "_fp8_dtype", None) is None:
        plain: Tensor = tensor
        return plain
    te = _kinds()
    by_runs = isinstance(tensor, te.MXFP8TensorStorage)
    by_tiles = isinstance(tensor, te.Float8BlockwiseQTensorStorage)
    if by_tiles or by_runs:
        name = "_columnwise_data" if columnwise else "_rowwise_data"
    else:
        name = "_transpose" if columnwise else "_data"
    bits = getattr(tensor, name)
    if bits is None or (name == "_transpose" and tensor._transpose_invalid):
        raise RuntimeError(f"a product needs {name} of {type(tensor).__name__}, which is not there")
    values = bits.view(format_of(tensor))
    if by_runs:
        return _out_of_runs(tensor, values, columnwise)
    if by_tiles:
        matrix = values.reshape(len(values), -1) if columnwise else values.flatten(0, -2)
        inverse = tensor._columnwise_scale_inv if columnwise else tensor._rowwise_scale_inv
        high = TILE if tensor._is_2D_scaled else 1
        if not tensor._is_2D_scaled:
            inverse = inverse.t()
        result = out_of_tiles(matrix, inverse, high).reshape(values.shape)
    else:
        result = exact(values) * tensor._scale_inv
    return result.movedim(0, -1) if columnwise else result


def _out_of_runs(tensor: Any, values: Tensor, columnwise: bool) -> Tensor:
    matrix = values.flatten(0, -2)
    if columnwise:
        inverse = powers(tensor._columnwise_scale_inv).t()
        return out_of_tiles(matrix.t(), inverse, 1, RUN).t().reshape(values.shape)
    inverse = powers(tensor._rowwise_scale_inv)
    return out_of_tiles(matrix, inverse, 1, RUN).reshape(values.shape)


def _copy_runs(source: Tensor, target: Tensor, lengths: Any, places: Any) -> None:
    target.zero_()
    runs = zip(source.split(list(lengths)), target.split(list(places)), strict=True)
    for run, place in runs:
        rows = min(len(run), len(place))
        place[:rows] = run[:rows]


@emulates
def fused_multi_row_padding(
    input: Tensor, output: Tensor, input_row_list: Any, padded_input_row_list: Any
) -> None:
    """Rows of zeros behind each run of rows."""
    _copy_runs(input, output, input_row_list, padded_input_row_list)


@emulates
def fused_multi_row_unpadding(
    input: Tensor, output: Tensor, input_row_list: Any, unpadded_input_row_list: Any
) -> None:
    """The inverse of `fused_multi_row_padding`."""
    _copy_runs(input, output, input_row_list, unpadded_input_row_list)
