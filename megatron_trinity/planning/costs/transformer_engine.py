"""What Transformer Engine's extension launches, where an emulation stands in for it."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_trinity.planning.costs.gpu_paths import norm_backward, norm_forward
from megatron_trinity.planning.costs.operations import one_launch
from megatron_trinity.upstream.registry import rebind

PACKAGE = "transformer_engine"
EXTENSION = "transformer_engine_torch"
NORMS = (EXTENSION, f"{PACKAGE}.pytorch.cpp_extensions", f"{PACKAGE}.pytorch.ops.basic.rmsnorm")
"""Modules that hold the norm's functions."""

QUESTIONS = "get_"
"""How the names of functions begin that launch nothing."""


def count_extension() -> None:
    """Let each of its functions be one launch, and a grouped product one for each group with rows:
    it calls the library of products for each."""
    extension = sys.modules[EXTENSION]
    for name, function in list(vars(extension).items()):
        if isinstance(function, types.FunctionType) and not name.startswith(("_", QUESTIONS)):
            number = groups_with_rows if name == "te_general_grouped_gemm" else None
            counted = one_launch(name, function, number)
            setattr(extension, name, counted)
            for package in (PACKAGE, "megatron"):
                rebind(function, counted, package)
    for name in NORMS:
        module: Any = importlib.import_module(name)
        module.rmsnorm_fwd, module.rmsnorm_bwd = rmsnorm_fwd, rmsnorm_bwd
        module.layernorm_fwd = module.layernorm_bwd = None  # asked for beside them, not called


def groups_with_rows(a: Sequence[Any], transa: bool, b: Sequence[Any], *_: Any, **__: Any) -> int:
    """Of the arguments of a grouped product."""
    return sum(
        bool(left.size().numel() and right.size().numel()) for left, right in zip(a, b, strict=True)
    )


def rmsnorm_fwd(
    hidden: Tensor, gain: Tensor, eps: float, *_: Any, **__: Any
) -> tuple[Tensor, None, Tensor]:
    """The extension's, in bf16 and fp32: a launch each way."""
    y, r = norm_forward(hidden, gain, eps)
    return y, None, r.flatten()


def rmsnorm_bwd(
    gradient: Tensor, hidden: Tensor, r: Tensor, gain: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    """Its backward pass."""
    of_x, of_gain = norm_backward(
        gradient.view_as(hidden), hidden, gain, r.view(*hidden.shape[:-1], 1)
    )
    return of_x, of_gain
