"""Products of matrices, as cuBLAS makes them for Transformer Engine.

cuBLAS counts columns first, so that a call `(A, B)` means `op(B) @ op(A)` of row-major matrices.
Factors of eight bits are multiplied as what they stand for, and the product is not of eight bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.transformer_engine.emulation.enumerations import torch_dtype
from tests.transformer_engine.emulation.extension import emulates
from tests.transformer_engine.emulation.quantized import format_of, operand


class Product(NamedTuple):
    """What a product was made of.

    Attributes:
        which: output, gradient of the input, or gradient of the weight.
        formats: of the two factors, in the order of the call.
    """

    which: str
    formats: tuple[torch.dtype, torch.dtype]


products: deque[Product] = deque(maxlen=1 << 16)
"""The last ones, so that a test sees in which format each was made."""

_WHICH = {(True, False): "output", (False, False): "input", (False, True): "weight"}


def product(a: Any, trans_a: bool, b: Any, trans_b: bool, dtype: torch.dtype) -> Tensor:
    """`op(B) @ op(A)`, summed in fp32 and rounded to `dtype`; leading axes of B stay."""
    products.append(Product(_WHICH[trans_a, trans_b], (format_of(a), format_of(b))))
    a, b = operand(a, columnwise=not trans_a), operand(b, columnwise=trans_b)
    left, right = b.reshape(-1, b.shape[-1]), a.reshape(-1, a.shape[-1])
    left, right = left.t() if trans_b else left, right.t() if trans_a else right
    if not left.dtype == right.dtype == dtype:
        left, right = left.float(), right.float()
    # In one dtype torch sums in fp32 as well, and gives the bits of the portable layers.
    result = (left @ right).to(dtype)
    return result if trans_b else result.reshape(*b.shape[:-1], result.shape[-1])


@emulates
def generic_gemm(
    A: Tensor,
    transA: bool,
    B: Tensor,
    transB: bool,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: int | None,
    bias: Tensor | None,
    bias_type: int,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Tensor | None]:
    """One product; into `D` if there is one, on top of it with `accumulate`."""
    if quantizer is not None:
        raise NotImplementedError("a quantized result of a product is not emulated")
    if gelu or comm_overlap is not None or (bias is not None and bias.numel()) or alpha != 1.0:
        raise NotImplementedError("a product with bias, GELU, scale or overlap is not emulated")
    dtype = (A._dtype if hasattr(A, "_dtype") else A.dtype) if D is None else D.dtype
    if output_dtype is not None:
        dtype = torch_dtype(output_dtype)
    result = product(A, transA, B, transB, dtype)
    if D is None:
        D = result
    elif accumulate:
        D += result.view_as(D)
    else:
        D.copy_(result.view_as(D))
    return [D, None, None, extra_output]


@emulates
def te_general_grouped_gemm(
    A: Sequence[Tensor],
    transa: bool,
    B: Sequence[Tensor],
    transb: bool,
    D: Sequence[Tensor],
    D_type: int,
    m_splits: Sequence[int],
    bias: Sequence[Tensor],
    bias_type: int,
    single_output: bool,
    pre_gelu_out: Sequence[Tensor],
    grad: bool,
    workspace: Sequence[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> Sequence[Tensor]:
    """A product for each group; of a group without rows, zeros."""
    if any(tensor.numel() for tensor in (*bias, *pre_gelu_out)):
        raise NotImplementedError("grouped products with bias or GELU")
    outputs = D[0].split([b.size()[0] for b in B]) if single_output else D
    for a, b, out in zip(A, B, outputs, strict=True):
        if a.size().numel() and b.size().numel():
            result = product(a, transa, b, transb, torch_dtype(D_type)).view_as(out)
            out.copy_(out + result if accumulate else result)
        elif not accumulate:
            out.zero_()
    return bias
