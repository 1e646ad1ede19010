"""Balance of experts, beside plain loops over exact integers."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_trinity.moe.metrics import LoadMetrics, by_layer, load_metrics, summary

Counts = list[list[int]]

NAMES = [
    "max violation",
    "min violation",
    "mean violation",
    "load entropy",
    "unused experts",
    "max expert bias",
]


@st.composite
def layers(draw: st.DrawFn, largest: int = 2**40) -> Counts:
    """Counts of up to four layers with equally many experts, some without any token."""
    num_experts = draw(st.integers(1, 9))
    count = st.one_of(st.just(0), st.integers(0, 20), st.integers(0, largest))
    layer = st.lists(count, min_size=num_experts, max_size=num_experts)
    return draw(st.lists(layer, min_size=1, max_size=4))


def measure(counts: Counts, bias: list[list[float]] | None = None) -> LoadMetrics:
    loads = torch.tensor(counts, dtype=torch.int64)
    return load_metrics(loads, torch.zeros(loads.shape) if bias is None else torch.tensor(bias))


def reference(counts: list[int]) -> dict[str, float]:
    """The formulas for one layer, in rational numbers."""
    total = sum(counts)
    if total == 0:
        return dict.fromkeys(NAMES[:5], 0.0)
    mean = Fraction(total, len(counts))
    shares = [count / total for count in counts if count]
    return {
        "max violation": float((max(counts) - mean) / mean),
        "min violation": float((min(counts) - mean) / mean),
        "mean violation": float(sum(abs(n - mean) for n in counts) / len(counts) / mean),
        "load entropy": -math.fsum(share * math.log(share) for share in shares),
        "unused experts": float(counts.count(0)),
    }


@given(layers())
def test_formulas(counts: Counts) -> None:
    numbers = range(2, 2 + len(counts))
    values = by_layer(measure(counts), numbers)
    for number, layer in zip(numbers, counts, strict=True):
        for name, expected in reference(layer).items():
            found = values[f"{name}/layer {number:02d}"]
            assert found == pytest.approx(expected, rel=1e-12, abs=1e-12), (name, layer)


@given(layers())
def test_bounds(counts: Counts) -> None:
    metrics = measure(counts)
    num_experts = len(counts[0])
    assert (metrics.max_violation >= 0).all()
    assert (metrics.max_violation <= num_experts - 1).all()
    assert (metrics.min_violation <= 0).all()
    assert (metrics.min_violation >= -1).all()
    assert (metrics.mean_violation >= 0).all()
    assert (metrics.mean_violation < 2).all()
    assert (metrics.mean_violation <= 2 * metrics.max_violation + 1e-12).all()
    assert (metrics.entropy >= 0).all()
    assert (metrics.entropy <= math.log(num_experts) + 1e-12).all()
    assert (metrics.unused_experts < num_experts).all()


@given(layers(largest=2**20), st.integers(2, 2**20))
def test_the_number_of_tokens_does_not_matter(counts: Counts, factor: int) -> None:
    metrics = measure(counts)
    scaled = measure([[factor * count for count in layer] for layer in counts])
    for field in dataclasses.fields(LoadMetrics):
        torch.testing.assert_close(getattr(scaled, field.name), getattr(metrics, field.name))


@given(layers())
def test_the_order_of_experts_does_not_matter(counts: Counts) -> None:
    ordered = [sorted(layer) for layer in counts]
    for field in dataclasses.fields(LoadMetrics):
        torch.testing.assert_close(
            getattr(measure(ordered), field.name), getattr(measure(counts), field.name)
        )


def test_one_expert_takes_all() -> None:
    metrics = measure([[0, 0, 12, 0]])
    assert metrics.max_violation.tolist() == [3.0]
    assert metrics.min_violation.tolist() == [-1.0]
    assert metrics.mean_violation.tolist() == [1.5]
    assert metrics.entropy.tolist() == [0.0]
    assert metrics.unused_experts.tolist() == [3]


def test_perfect_balance() -> None:
    metrics = measure([[7] * 8])
    assert metrics.max_violation.tolist() == [0.0]
    assert metrics.min_violation.tolist() == [0.0]
    assert metrics.mean_violation.tolist() == [0.0]
    assert metrics.entropy.item() == pytest.approx(math.log(8), rel=1e-15)
    assert metrics.unused_experts.tolist() == [0]


def test_a_layer_without_tokens_is_zero_and_keeps_its_bias() -> None:
    metrics = measure([[0, 0, 0], [1, 2, 3]], bias=[[0.5, -0.75, 0.25], [0.0, 0.0, 0.0]])
    for field in dataclasses.fields(LoadMetrics):
        if field.name != "max_bias":
            assert getattr(metrics, field.name)[0].item() == 0, field.name
    assert metrics.max_bias.tolist() == [0.75, 0.0]
    assert metrics.max_violation[1].item() == 0.5


@pytest.mark.parametrize("size", [2**24, 2**31, 2**33, 2**53])
def test_one_token_more_is_seen(size: int) -> None:
    metrics = measure([[size + 1, size, size, size]])
    mean = Fraction(4 * size + 1, 4)
    assert metrics.max_violation.item() == float((size + 1 - mean) / mean) > 0
    assert metrics.min_violation.item() == float((size - mean) / mean) < 0


def test_counts_of_a_smaller_integer_do_not_overflow() -> None:
    counts = torch.full((1, 4), 2**30, dtype=torch.int32)
    metrics = load_metrics(counts, torch.zeros(1, 4))
    assert metrics.max_violation.tolist() == [0.0]
    assert metrics.entropy.item() == pytest.approx(math.log(4))


def test_summary() -> None:
    counts = [[4, 0, 0, 0], [1, 1, 1, 1], [0, 0, 3, 5]]
    bias = [[0.0, 0.25, -0.5, 0.25], [0.0] * 4, [0.125, -0.125, 0.0, 0.0]]
    values = summary(measure(counts, bias))
    layer = [reference(one) for one in counts]
    assert list(values) == NAMES
    assert values == pytest.approx(
        {
            "max violation": 3.0,
            "min violation": -1.0,
            "mean violation": sum(one["mean violation"] for one in layer) / 3,
            "load entropy": sum(one["load entropy"] for one in layer) / 3,
            "unused experts": 5.0,
            "max expert bias": 0.5,
        }
    )


def test_names_by_layer() -> None:
    values = by_layer(measure([[1, 0], [1, 1]], bias=[[-0.5, 0.5], [0.0, 0.0]]), [3, 10])
    assert list(values) == [f"{name}/layer {number}" for name in NAMES for number in ("03", "10")]
    assert values["max violation/layer 03"] == 1.0
    assert values["unused experts/layer 10"] == 0.0
    assert values["max expert bias/layer 03"] == 0.5
    assert all(type(value) is float for value in values.values())


@pytest.mark.parametrize("numbers", [[], [3], [3, 4, 5], [3, 3]])
def test_as_many_numbers_as_layers(numbers: list[int]) -> None:
    with pytest.raises(ValueError, match="2 layers need as many different numbers"):
        by_layer(measure([[1, 0], [1, 1]]), numbers)


def test_a_model_without_experts() -> None:
    empty = torch.zeros(0, 4, dtype=torch.int64)
    metrics = load_metrics(empty, torch.zeros(0, 4))
    assert summary(metrics) == {}
    assert by_layer(metrics, []) == {}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_bias_that_is_not_finite_shows(number: float) -> None:
    values = summary(measure([[1, 1], [1, 1]], bias=[[0.0, number], [0.0, 0.0]]))
    assert not math.isfinite(values["max expert bias"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool])
def test_counts_have_to_be_integers(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="have to be integers"):
        load_metrics(torch.ones(2, 4, dtype=dtype), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("counts", "bias"), [((4,), (4,)), ((2, 4), (4,)), ((2, 4), (4, 2)), ((2, 0), (2, 0))]
)
def test_shapes_have_to_fit(counts: tuple[int, ...], bias: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"have to be \[layers, experts\]"):
        load_metrics(torch.zeros(counts, dtype=torch.int64), torch.zeros(bias))
