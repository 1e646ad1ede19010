"""The iteration on a CPU against the plain one in fp64, for every way that it goes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megatron_trinity.optimizer.newton_schulz import coefficients, newton_schulz
from megatron_trinity.optimizer.symmetric import BLOCK, iterate_, symmetric_product


def random(*shape: int) -> Tensor:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    return matrices / torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)


def plain(matrices: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    x = matrices.double()
    for a, b, c in steps:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("rows", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 44])
def test_a_symmetric_product_is_the_product(rows: int) -> None:
    (left,) = random(1, rows, 50)
    got = symmetric_product(left, left.T, torch.full((rows, rows), torch.nan))
    torch.testing.assert_close(got, left @ left.T, atol=1e-7, rtol=0)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize(
    "shape",
    [(2, 40, 40), (2, 150, 150), (1, 300, 599), (2, 20, 40), (3, 130, 400), (1, 300, 600)],
    ids=str,
)
def test_every_number_of_steps(shape: tuple[int, int, int], number: int) -> None:
    matrices, steps = random(*shape), coefficients("quintic", number)
    got = matrices.clone()
    iterate_(got, steps)
    torch.testing.assert_close(got.double(), plain(matrices, steps), atol=1e-5, rtol=0)


@pytest.mark.parametrize("columns", [256, 1024], ids=["directly", "on the Gram matrix"])
def test_a_matrix_of_low_rank_is_as_precise(columns: int) -> None:
    generator = torch.Generator().manual_seed(9)
    matrix = torch.randn(1, 256, 8, generator=generator) @ torch.randn(
        1, 8, columns, generator=generator
    )
    matrix /= matrix.norm()
    got, steps = matrix.clone(), coefficients("quintic", 5)
    iterate_(got, steps)
    exact = plain(matrix, steps)
    # Without a new Gram matrix on the way it is 2e-3.
    assert (got - exact).norm() / exact.norm() < 1e-4


def test_a_matrix_is_the_same_in_every_batch() -> None:
    steps = coefficients("quintic", 5)
    for shape in ((3, 130, 140), (3, 130, 400)):
        matrices = random(*shape)
        together = newton_schulz(matrices.clone(), steps, torch.float32)
        for matrix, result in zip(matrices, together, strict=True):
            alone = newton_schulz(matrix[None].clone(), steps, torch.float32)[0]
            assert torch.equal(alone, result)
