"""How evenly tokens spread over experts, and how large the bias that spreads them has become.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LoadMetrics:
    """One step's balance of every MoE layer; tensors `[L]`, fp64 but for `unused_experts`.

    With n_i the tokens of expert i and n the mean over the experts of its layer:

    max_violation: (max_i n_i - n) / n, MaxVio (report, eq. 42); from 0 to E/k - 1 for top-k.
    min_violation: (min_i n_i - n) / n; from -1 to 0.
    mean_violation: mean_i |n_i - n| / n; from 0 to below 2.
    entropy: -sum_i p_i ln p_i with p_i = n_i / sum_j n_j, in nats; from 0 to ln E.
    unused_experts: experts without a token, int64.
    max_bias: max_i |b_i|.
    """

    max_violation: Tensor
    min_violation: Tensor
    mean_violation: Tensor
    entropy: Tensor
    unused_experts: Tensor
    max_bias: Tensor


def load_metrics(counts: Tensor, bias: Tensor) -> LoadMetrics:
    """Measure the balance of one step.

    A layer without tokens has zeros for all but `max_bias`: there is nothing to be uneven.
    Differences are taken in int64, so they are exact while E times the largest count is below 2^63.

    Args:
        counts: `[L, E]` of an integer dtype, tokens routed to each expert in the global batch.
        bias: `[L, E]`, what is added to the scores for the choice of experts.
    Raises: ValueError for floating-point counts (fp32 is exact only to 2^24), shapes that differ
    or are not `[L, E]`, or E = 0.
    """
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise ValueError(f"counts of tokens have to be integers, not {counts.dtype}")
    if counts.ndim != 2 or counts.shape != bias.shape or counts.shape[1] == 0:
        raise ValueError(
            "counts and bias have to be [layers, experts], "
            f"not {list(counts.shape)} and {list(bias.shape)}"
        )
    counts = counts.long()
    num_experts = counts.shape[1]
    total = counts.sum(dim=1)
    used = total > 0
    tokens = total.clamp(min=1).double()
    excess = num_experts * counts - total.unsqueeze(1)  # E (n_i - n)
    return LoadMetrics(
        max_violation=excess.amax(dim=1).double() / tokens,
        min_violation=excess.amin(dim=1).double() / tokens,
        mean_violation=excess.double().abs().mean(dim=1) / tokens,
        entropy=torch.special.entr(counts.double() / tokens.unsqueeze(1)).sum(dim=1),
        unused_experts=(counts == 0).sum(dim=1) * used,
        max_bias=bias.abs().amax(dim=1).double(),
    )


def summary(metrics: LoadMetrics) -> dict[str, float]:
    """The model's balance in six numbers, by their names in the log; none for a model without MoE.

    Violations and bias are those of the worst layer, "mean violation" and "load entropy" means over
    layers, "unused experts" a sum. A bias that is not finite shows as such.
    """
    if metrics.max_violation.numel() == 0:
        return {}
    values = _by_name(metrics)
    numbers = {name: _OVER_LAYERS[name](value) for name, value in values.items()}
    # Stacked, so that a GPU is waited for once.
    return dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))


def by_layer(metrics: LoadMetrics, layer_numbers: Sequence[int]) -> dict[str, float]:
    """The same values for each layer, named like "max violation/layer 03".

    Args:
        layer_numbers: numbers of the L layers in the model, counted from 1, in the order of the
            counts.
    Raises: ValueError if there are not L distinct numbers.
    """
    num_layers = metrics.max_violation.numel()
    if len(layer_numbers) != num_layers or len(set(layer_numbers)) != num_layers:
        raise ValueError(
            f"{num_layers} layers need as many different numbers, not {list(layer_numbers)}"
        )
    values = _by_name(metrics)
    rows = torch.stack(list(values.values())).tolist()
    return {
        f"{name}/layer {number:02d}": value
        for name, row in zip(values, rows, strict=True)
        for number, value in zip(layer_numbers, row, strict=True)
    }


_OVER_LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "max violation": torch.amax,
    "min violation": torch.amin,
    "mean violation": torch.mean,
    "load entropy": torch.mean,
    "unused experts": torch.sum,
    "max expert bias": torch.amax,
}


def _by_name(metrics: LoadMetrics) -> dict[str, Tensor]:
    """`[L]` fp64 each, by their names in the log."""
    return {
        "max violation": metrics.max_violation,
        "min violation": metrics.min_violation,
        "mean violation": metrics.mean_violation,
        "load entropy": metrics.entropy,
        "unused experts": metrics.unused_experts.double(),
        "max expert bias": metrics.max_bias,
    }
