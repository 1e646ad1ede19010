"""The Newton-Schulz iteration on a CPU, in fp32: one matrix at a time, with fewer multiplications.

Products of `A = XX^T` and its polynomials are symmetric, so blocks above the diagonal are enough:
3/4 of the work with two blocks a side, nearly half with many. Where X has many more columns than
rows, the iteration runs on A, which is small, and meets X only once in a few steps:

    X_k+1 = P_k X_k,  A_k+1 = P_k A_k P_k  with  P_k = aI + b A_k + c A_k^2

since P_k commutes with A_k. Rounding of A hides singular values below the root of fp32's precision;
it is made anew from X after a few steps, before they have grown so much that this is seen.

Shapes: m rows, n columns, m at most n.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 128
"""Rows of a block: smaller ones save more, larger ones are multiplied faster."""
WIDE = 2
"""Columns over rows from which on the iteration runs on A; there its work is a third less."""
STEPS_ON_GRAM = 3
"""After which A is made anew. With 5 it errs by 3e-3 on a matrix of rank 8, with 3 by 4e-5."""


def iterate_(matrices: Tensor, steps: Sequence[tuple[float, float, float]]) -> None:
    """`X <- aX + (bA + cA^2)X`, `A = XX^T`, for each step and each X of `[B, m, n]`, in place."""
    rows, columns = matrices.shape[1:]
    on_gram = columns >= WIDE * rows
    workspace = matrices.new_empty(4 if on_gram else 2, rows, rows)
    other = matrices.new_empty(rows, columns)
    for x in matrices:
        if on_gram:
            for first in range(0, len(steps), STEPS_ON_GRAM):
                _on_gram(x, steps[first : first + STEPS_ON_GRAM], workspace, other)
        else:
            _directly(x, steps, workspace, other)


def symmetric_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`left @ right` into `out`, `[m, m]`, if it is known to be symmetric.

    Args: left: `[m, k]`; right: `[k, m]`.
    """
    for start in range(0, len(out), BLOCK):
        end = start + BLOCK
        torch.mm(left[start:end], right[:, start:], out=out[start:end, start:])
        out[end:, start:end].copy_(out[start:end, end:].T)
    return out


def _directly(
    x: Tensor, steps: Sequence[tuple[float, float, float]], workspace: Tensor, other: Tensor
) -> None:
    gram, square = workspace
    current, following = x, other
    for a, b, c in steps:
        symmetric_product(current, current.T, gram)
        polynomial = symmetric_product(gram, gram, square).mul_(c).add_(gram, alpha=b)
        torch.addmm(current, polynomial, current, beta=a, out=following)
        current, following = following, current
    if current is not x:
        x.copy_(current)


def _on_gram(
    x: Tensor, steps: Sequence[tuple[float, float, float]], workspace: Tensor, other: Tensor
) -> None:
    gram, polynomial, product, spare = workspace
    symmetric_product(x, x.T, gram)
    for number, (a, b, c) in enumerate(steps):
        symmetric_product(gram, gram, polynomial).mul_(c).add_(gram, alpha=b)
        polynomial.diagonal().add_(a)
        if number == 0:
            product.copy_(polynomial)
        else:
            product, spare = symmetric_product(polynomial, product, spare), product
        if number + 1 < len(steps):
            symmetric_product(polynomial, gram, spare)
            symmetric_product(spare, polynomial, gram)
    torch.mm(product, x, out=other)
    x.copy_(other)
