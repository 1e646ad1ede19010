"""Orthogonalisation of many matrices at once, and the learning rate that goes with a shape.

Shapes: B matrices, m rows (fan_out), n columns (fan_in).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from emerging_optimizers.orthogonalized_optimizers.muon_utils import (
    _COEFFICIENT_SETS,
    get_coefficient_iterator,
)
from torch import Tensor

from megatron_trinity.optimizer.symmetric import iterate_

Coefficients = Sequence[tuple[float, float, float]]

REPEAT_LAST = ("polar_express", "cans", "deepseekv4")
"""Sets whose last triple goes on where there are more steps than triples; others start again."""

EPS = 1e-7  # of the norm that a matrix is divided by, as in emerging-optimizers


def coefficients(name: str, steps: int) -> list[tuple[float, float, float]]:
    """`(a, b, c)` of each step, from emerging-optimizers; `quintic` holds those of Dion.

    Raises: KeyError if there is no such set.
    """
    mode = "repeat_last" if name in REPEAT_LAST else "cycle"
    return list(get_coefficient_iterator(steps, _COEFFICIENT_SETS[name], mode))


def newton_schulz(matrices: Tensor, steps: Coefficients, dtype: torch.dtype) -> Tensor:
    """Bring every singular value of every matrix near 1: `X <- aX + (bA + cA^2)X`, `A = XX^T`.

    Args:
        matrices: `[B, m, n]`, m at most n; overwritten where `dtype` is its own.
        steps: coefficients of each step.
        dtype: what the products are computed in; the norm is always that of `matrices`.
    Returns: `[B, m, n]` in `dtype`; each matrix as if it were the only one.
    """
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    out = (
        matrices
        if dtype == matrices.dtype
        else torch.empty(matrices.shape, dtype=dtype, device=matrices.device)
    )
    x = torch.div(matrices, norms.clamp_min_(EPS), out=out)
    if x.device.type == "cpu" and dtype == torch.float32:
        iterate_(x, steps)
        return x
    for a, b, c in steps:
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def lr_scale(rows: int, columns: int) -> float:
    """Factor of the learning rate of a matrix: sqrt(max(1, fan_out / fan_in)) (report, eq. 41)."""
    return float(max(1.0, rows / columns) ** 0.5)


def flops(rows: int, columns: int, steps: int) -> int:
    """Of `steps` steps on one matrix, a multiplication and an addition counted as two."""
    short, long = sorted((rows, columns))
    return steps * (4 * short * short * long + 2 * short**3)
