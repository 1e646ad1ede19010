"""Initial weights: their distribution, that no two matrices are alike, and the seed."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_trinity.model.initialization import matrix_seed, truncated_normal
from megatron_trinity.model.shards import Shard, whole_tensors
from tests.distributed.pool import RankPools
from tests.trinity import afmoe_config, build, parse

# Variance of a standard normal cut at 3: 1 - 2 * 3 phi(3) / (2 Phi(3) - 1).
CUT = 3.0
TRUNCATED_STD = math.sqrt(
    1 - 2 * CUT * math.exp(-(CUT**2) / 2) / math.sqrt(2 * math.pi) / math.erf(CUT / math.sqrt(2))
)
SEED = 77


def cdf(x: Tensor) -> Tensor:
    """Of the standard normal cut at 3."""
    normal = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    low = 0.5 * (1 + math.erf(-CUT / math.sqrt(2)))
    return (normal - low) / (1 - 2 * low)


def test_the_theory_of_this_test() -> None:
    assert pytest.approx(0.98658, abs=1e-5) == TRUNCATED_STD


@pytest.mark.parametrize("sigma", [0.5 / 8, 0.009])
def test_the_draw_is_a_normal_cut_at_three_sigma(sigma: float) -> None:
    draw = (truncated_normal((400, 500), sigma, SEED) / sigma).double().flatten()
    count = len(draw)
    assert draw.abs().max() <= CUT * (1 + 1e-6)
    assert draw.abs().max() > 2.95, "the cut is at three sigma, not before"
    assert abs(draw.mean().item()) < 5 * TRUNCATED_STD / math.sqrt(count)
    assert draw.std().item() == pytest.approx(TRUNCATED_STD, rel=5 / math.sqrt(2 * count))
    # Kolmogorov-Smirnov at a level of about one in ten thousand.
    steps = torch.arange(1, count + 1).double() / count
    assert (cdf(draw.sort().values) - steps).abs().max() < 2.2 / math.sqrt(count)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**63 - 1), rows=st.integers(1, 5))
def test_any_seed_is_taken_and_repeats(seed: int, rows: int) -> None:
    first, second = (truncated_normal((rows, 3), 0.02, seed) for _ in range(2))
    assert first.dtype == torch.float32
    assert torch.equal(first, second)


def shard(key: str, *index: int) -> Shard:
    whole = (*(8 for _ in index), 4, 4)
    return Shard(key, torch.empty(4, 4), whole, (*index, 0, 0), len(index))


def test_matrix_seeds_differ_by_name_expert_and_seed() -> None:
    seeds = {matrix_seed(seed, shard("w", e)) for seed in range(20) for e in range(8)}
    seeds |= {matrix_seed(1, shard(f"layers.{layer}.w")) for layer in range(50)}
    assert len(seeds) == 20 * 8 + 50
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Checkpoints of the past would no longer be reproducible if this changed.
    digest = hashlib.blake2b(b"5/w/(3,)", digest_size=8).digest()
    assert matrix_seed(5, shard("w", 3)) == int.from_bytes(digest, "little") // 2


def initial_weights(rank: int, world_size: int, seed: int) -> dict[str, Tensor]:
    return whole_tensors(build(parse(afmoe_config(), ("--seed", str(seed)))))


@pytest.fixture(scope="module")
def weights(ranks: RankPools) -> dict[str, Tensor]:
    [tensors] = ranks.run(initial_weights, 1234, world_size=1)
    return tensors


SIGMA = 0.02  # the initializer_range of `afmoe_config()`


def matrices(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every matrix of the model, each expert's own, fused gate and up apart."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if tensor.ndim == 3:
            found |= {f"{name}[{expert}]": matrix for expert, matrix in enumerate(tensor)}
        elif tensor.ndim == 2:
            found[name] = tensor
    for name in [name for name in found if "linear_fc1" in name]:
        found[name + ".gate"], found[name + ".up"] = found.pop(name).chunk(2)
    return found


def test_every_matrix_of_a_model_has_the_distribution(weights: dict[str, Tensor]) -> None:
    drawn = matrices(weights)
    assert len(drawn) == 2 + 5 * 2 + 3 + 4 * (1 + 3 + 8 * 3)
    for name, matrix in drawn.items():
        count = matrix.numel()
        assert matrix.abs().max() <= CUT * SIGMA * (1 + 1e-6), name
        assert abs(matrix.mean().item()) < 5 * SIGMA / math.sqrt(count), name
        ratio = matrix.std().item() / (TRUNCATED_STD * SIGMA)
        assert ratio == pytest.approx(1, rel=5 / math.sqrt(2 * count)), name


def test_no_two_matrices_are_alike(weights: dict[str, Tensor]) -> None:
    starts = {tuple(matrix.flatten()[:8].tolist()) for matrix in matrices(weights).values()}
    assert len(starts) == len(matrices(weights))


def test_vectors_are_left_as_built(weights: dict[str, Tensor]) -> None:
    vectors = {name: tensor for name, tensor in weights.items() if tensor.ndim == 1}
    assert len(vectors) == 1 + 5 * 6 + 4
    for name, vector in vectors.items():
        expected = 0.0 if "expert_bias" in name else 5**-0.5 if "bda" in name else 1.0
        torch.testing.assert_close(vector, torch.full_like(vector, expected), rtol=1e-7, atol=0)


def test_the_seed_decides(ranks: RankPools, weights: dict[str, Tensor]) -> None:
    [again] = ranks.run(initial_weights, 1234, world_size=1)
    [other] = ranks.run(initial_weights, 1235, world_size=1)
    assert again.keys() == other.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, again[name]), name
        assert torch.equal(tensor, other[name]) == (tensor.ndim == 1), name


def sigma_from_the_width(rank: int, world_size: int) -> tuple[float, float]:
    from megatron_trinity.arguments.parse import parse_arguments

    def config(*flags: str) -> Any:
        return parse_arguments(["--preset", "tiny", "--train-iters", "1", *flags]).init_method_std

    return config(), config("--init-method-std", "0.03")


def test_sigma_follows_the_width_unless_given(ranks: RankPools) -> None:
    [(derived, given_sigma)] = ranks.run(sigma_from_the_width, world_size=1)
    assert derived == pytest.approx(0.5 / math.sqrt(192), rel=1e-12)
    assert given_sigma == 0.03
