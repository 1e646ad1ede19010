"""The batched iteration against one matrix at a time in fp64, and what goes with a shape."""

from __future__ import annotations

import pytest
import torch
from emerging_optimizers.orthogonalized_optimizers.muon_utils import _COEFFICIENT_SETS
from torch import Tensor

from megatron_trinity.arguments.optimizer import COEFFICIENT_TYPES
from megatron_trinity.optimizer.newton_schulz import (
    coefficients,
    flops,
    lr_scale,
    newton_schulz,
)

DION = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


def plain(matrix: Tensor, steps: list[tuple[float, float, float]]) -> Tensor:
    """Each singular value through the same polynomials, which is what the iteration does."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / matrix.double().norm()
    for a, b, c in steps:
        values = a * values + b * values**3 + c * values**5
    return left @ values.diag() @ right


def test_the_default_set_is_the_public_codes() -> None:
    assert coefficients("quintic", 5) == DION


def test_more_steps_than_triples() -> None:
    assert coefficients("quintic", 7)[5:] == DION[:2]
    assert coefficients("polar_express", 10)[7:] == [(1.8750, -1.2500, 0.3750)] * 3
    assert coefficients("simple", 3) == [(3.4445, -4.7750, 2.0315)] * 3


def test_what_is_refused_knows_every_set() -> None:
    assert sorted([*COEFFICIENT_TYPES, "cans"]) == sorted(_COEFFICIENT_SETS)


@pytest.mark.parametrize("name", COEFFICIENT_TYPES)
@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 24, 24), (1, 1, 7), (5, 8, 9)])
def test_a_batch_is_each_matrix_by_itself(name: str, shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 7
    steps = coefficients(name, 5)
    got = newton_schulz(matrices.clone(), steps, torch.float32)
    for matrix, result in zip(matrices, got, strict=True):
        torch.testing.assert_close(result.double(), plain(matrix, steps), atol=2e-5, rtol=0)


def test_singular_values_come_near_one() -> None:
    matrices = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(4))
    values = torch.linalg.svdvals(
        newton_schulz(matrices, coefficients("quintic", 5), torch.float32)
    )
    assert values.min() > 0.7
    assert values.max() < 1.2


def test_bf16_is_computed_in_bf16() -> None:
    matrices = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(5))
    steps = coefficients("quintic", 5)
    got = newton_schulz(matrices.clone(), steps, torch.bfloat16)
    assert got.dtype == torch.bfloat16
    exact = newton_schulz(matrices.clone(), steps, torch.float32)
    difference = (got.float() - exact).norm() / exact.norm()
    assert 1e-4 < difference < 3e-2


def test_a_matrix_of_zeros_stays_zero() -> None:
    got = newton_schulz(torch.zeros(2, 4, 8), coefficients("quintic", 5), torch.float32)
    assert torch.equal(got, torch.zeros(2, 4, 8))


@pytest.mark.parametrize(
    ("name", "rows", "columns", "scale"),
    [
        ("query of large", 6144, 3072, 2**0.5),
        ("key of large", 1024, 3072, 1.0),
        ("dense gate of large", 12288, 3072, 2.0),
        ("dense down of large", 3072, 12288, 1.0),
        ("expert of large", 3072, 3072, 1.0),
        ("router of large", 256, 3072, 1.0),
        ("expert down of nano", 1024, 256, 2.0),
    ],
)
def test_the_learning_rate_of_a_shape(name: str, rows: int, columns: int, scale: float) -> None:
    assert lr_scale(rows, columns) == pytest.approx(scale), name


def test_flops_of_a_step() -> None:
    # X X^T and P X of [4, 8]: 2 * 4 * 4 * 8 each; A A of [4, 4]: 2 * 4^3.
    assert flops(4, 8, 1) == flops(8, 4, 1) == 2 * (2 * 4 * 4 * 8) + 2 * 4**3
    assert flops(4, 8, 5) == 5 * flops(4, 8, 1)
