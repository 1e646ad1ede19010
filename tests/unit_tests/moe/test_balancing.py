"""The balancing rules against plain NumPy, equation by equation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_trinity.moe.balancing import sign_update, smebu_update, violation

Array = NDArray[np.float64]
COUNTS = st.lists(st.integers(0, 10**6), min_size=2, max_size=40)
KAPPA, LAMBDA, BETA = 2.0, 5e-4, 0.5


def plain_sign(bias: Array, counts: list[int], gamma: float) -> Array:
    mean = sum(counts) / len(counts)
    moved = np.array([b + gamma * np.sign(mean - n) for b, n in zip(bias, counts, strict=True)])
    return moved - moved.mean()


def plain_smebu(bias: Array, momentum: Array, counts: list[int]) -> tuple[Array, Array]:
    mean = sum(counts) / len(counts)
    step = np.array([LAMBDA * np.tanh(KAPPA * (mean - n) / mean) for n in counts])
    step -= step.mean()
    momentum = BETA * momentum + (1 - BETA) * step
    return bias + momentum, momentum


@given(COUNTS)
def test_the_sign_rule(counts: list[int]) -> None:
    bias = np.linspace(-0.3, 0.2, len(counts))
    got = sign_update(torch.tensor(bias, dtype=torch.float32), torch.tensor(counts), 1e-3)
    np.testing.assert_allclose(got.numpy(), plain_sign(bias, counts, 1e-3), atol=1e-7)
    assert got.dtype == torch.float32
    assert abs(got.mean().item()) < 1e-7


@given(COUNTS.filter(any))
def test_smebu_over_three_steps(counts: list[int]) -> None:
    bias, momentum = np.zeros(len(counts)), np.zeros(len(counts))
    ours = torch.zeros(len(counts)), torch.zeros(len(counts))
    for shift in range(3):
        turned = counts[shift:] + counts[:shift]
        bias, momentum = plain_smebu(bias, momentum, turned)
        ours = smebu_update(*ours, torch.tensor(turned), KAPPA, LAMBDA, BETA)
    np.testing.assert_allclose(ours[0].numpy(), bias, atol=1e-9)
    np.testing.assert_allclose(ours[1].numpy(), momentum, atol=1e-9)
    assert abs(ours[0].double().sum().item()) < 1e-8  # it stays centred by construction


def test_smebu_by_hand() -> None:
    counts = torch.tensor([3, 1])  # mean 2: v = -0.5, 0.5
    bias, momentum = smebu_update(
        torch.zeros(2), torch.tensor([1e-4, -1e-4]), counts, KAPPA, LAMBDA, BETA
    )
    step = 5e-4 * np.tanh(1.0)
    expected = [0.5 * 1e-4 - 0.5 * step, -0.5 * 1e-4 + 0.5 * step]
    np.testing.assert_allclose(momentum.numpy(), expected, rtol=1e-6)
    assert torch.equal(bias, momentum)


def test_the_step_is_bounded_however_uneven_the_load() -> None:
    counts = torch.tensor([10**12, 0, 0, 0])
    bias, _ = smebu_update(torch.zeros(4), torch.zeros(4), counts, KAPPA, LAMBDA, 0.0)
    assert bias.abs().max().item() <= 2 * LAMBDA


def test_a_sign_that_rounding_would_turn() -> None:
    """One token off the mean among 2^40: in fp32 the counts would be equal."""
    counts = torch.tensor([2**40, 2**40 + 1, 2**40 - 1, 2**40])
    moved = sign_update(torch.zeros(4), counts, 1.0)
    assert moved.tolist() == [0.0, -1.0, 1.0, 0.0]
    assert violation(counts)[1].item() == pytest.approx(-(2.0**-40), rel=1e-12)


def test_no_token_at_all_moves_nothing() -> None:
    nothing = torch.zeros(3, dtype=torch.int64)
    bias = torch.tensor([0.1, -0.2, 0.1])
    assert torch.allclose(sign_update(bias, nothing, 1e-3), bias, atol=1e-8)
    moved, momentum = smebu_update(bias, torch.zeros(3), nothing, KAPPA, LAMBDA, BETA)
    assert torch.equal(moved, bias)
    assert torch.equal(momentum, torch.zeros(3))


@pytest.mark.parametrize("factor", [2, 7])
def test_both_rules_ignore_how_often_everything_is_counted(factor: int) -> None:
    counts = torch.tensor([5, 9, 1, 0, 3])
    zeros = torch.zeros(5)
    assert torch.equal(sign_update(zeros, counts, 1e-3), sign_update(zeros, factor * counts, 1e-3))
    once = smebu_update(zeros, zeros, counts, KAPPA, LAMBDA, BETA)
    more = smebu_update(zeros, zeros, factor * counts, KAPPA, LAMBDA, BETA)
    assert torch.allclose(once[0], more[0], atol=1e-10)
