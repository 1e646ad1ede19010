"""The formulas of the architecture, at the values of the three published models."""

from __future__ import annotations

import pytest

from megatron_trinity.model.architecture import (
    initializer_sigma,
    layer_is_global,
    moe_pattern,
    no_rope_pattern,
    post_norm_gain,
)


@pytest.mark.parametrize(
    ("hidden_size", "sigma", "printed"),
    [(1024, 0.015625, 0.016), (2048, 0.011048543, 0.011), (3072, 0.009021098, 0.009)],
)
def test_initializer_sigma(hidden_size: int, sigma: float, printed: float) -> None:
    assert initializer_sigma(hidden_size) == pytest.approx(sigma, rel=1e-7)
    assert round(initializer_sigma(hidden_size), 3) == printed


@pytest.mark.parametrize(("num_layers", "gain"), [(56, 0.1336), (32, 0.1768), (60, 0.1291)])
def test_post_norm_gain(num_layers: int, gain: float) -> None:
    assert post_norm_gain(num_layers) ** 2 * num_layers == pytest.approx(1, rel=1e-12)
    assert round(post_norm_gain(num_layers), 4) == gain


@pytest.mark.parametrize("num_layers", [56, 32, 60])
def test_three_local_layers_then_a_global_one(num_layers: int) -> None:
    pattern = no_rope_pattern(num_layers, 4)
    assert pattern == [0, 0, 0, 1] * (num_layers // 4)
    assert [layer_is_global(layer, 4) for layer in range(num_layers)] == [
        layer % 4 == 3 for layer in range(num_layers)
    ]


def test_other_periods() -> None:
    assert no_rope_pattern(5, 1) == [1, 1, 1, 1, 1]
    assert no_rope_pattern(5, 2) == [0, 1, 0, 1, 0]
    assert no_rope_pattern(5, 8) == [0, 0, 0, 0, 0]


@pytest.mark.parametrize(("num_layers", "dense"), [(56, 2), (32, 2), (60, 6), (4, 0)])
def test_dense_layers_come_first(num_layers: int, dense: int) -> None:
    assert moe_pattern(num_layers, dense) == [0] * dense + [1] * (num_layers - dense)
