"""What the page of a run draws: curves, heat maps and marks, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_trinity.reporting.names import MEMORY, SPEED, THROUGHPUT
from megatron_trinity.reporting.run import Curve, Run
from megatron_trinity.reporting.series import (
    buckets,
    percentiles,
    smoothed,
    thinned,
    window_of,
    worst,
)

COLUMNS = 400
"""Steps or groups of steps that a heat map shows."""

CELLS = 400_000
"""Loads of single experts that a page holds of a run."""

SHARES = (50.0, 90.0, 99.0)

GIB = 2**30


@dataclass(frozen=True)
class Chart:
    """One picture of curves.

    Attributes:
        curves: names in the events, and what they are called here.
        smooth: whether a mean is drawn over the values of the steps.
        log: whether the values have a logarithmic axis.
    """

    id: str
    title: str
    unit: str
    curves: dict[str, str]
    smooth: bool = False
    log: bool = False


CHARTS = (
    Chart("loss", "Loss", "nats a token", {"lm loss": "training"}, smooth=True),
    Chart(
        "auxiliary",
        "Auxiliary losses",
        "nats",
        {"z loss": "z loss", "sequence loss": "sequence loss"},
    ),
    Chart(
        "rates",
        "Learning rates",
        "",
        {"learning-rate": "muon, or the only one", "adamw learning rate": "adamw"},
    ),
    Chart("norm", "Gradient norm", "", {"grad-norm": "norm"}, smooth=True, log=True),
    Chart("speed", "Tokens per second", "tokens/s", {SPEED: "all ranks"}, smooth=True),
    Chart(
        "throughput",
        "Throughput",
        "TFLOP/s a GPU or process",
        {THROUGHPUT: "throughput"},
        smooth=True,
    ),
    Chart(
        "violation",
        "Imbalance of the worst layer",
        "MaxVio",
        {"max violation": "worst layer", "mean violation": "mean"},
    ),
    Chart("dead", "Experts without a token", "experts", {"unused experts": "all layers"}),
    Chart("bias", "Largest expert bias", "", {"max expert bias": "all layers"}),
    Chart(
        "heterogeneity",
        "Batch heterogeneity",
        "nats a token",
        {"batch heterogeneity": "BatchHet"},
        smooth=True,
    ),
    Chart("logits", "Logits of the LM head", "", {"max logit": "largest", "mean logit": "mean"}),
    Chart("memory", "Peak memory", "GiB", {MEMORY: "the last rank"}),
)


def charts(runs: list[Run]) -> list[dict[str, Any]]:
    """All that have a point, with the step times behind the throughput."""
    drawn = [_chart(chart, runs) for chart in CHARTS]
    place = next(n for n, one in enumerate(drawn) if one["id"] == "throughput")
    drawn[place + 1 : place + 1] = [_step_times(runs), _slowest_ranks(runs)]
    return [one for one in drawn if one["traces"]]


def _chart(chart: Chart, runs: list[Run]) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        for name, label in chart.curves.items():
            curve = run.curve(name)
            if not len(curve[0]):
                continue
            traces.append(trace(number, label, curve, "faint" if chart.smooth else "line"))
            if chart.smooth:
                window = window_of(len(curve[0]))
                mean = curve[0], smoothed(curve[1], window)
                traces.append(trace(number, f"{label}, mean of {window}", mean, "line"))
        if chart.id == "loss":
            for label, curve in run.evaluations().items():
                traces.append(trace(number, label, curve, "points"))
    return {
        "id": chart.id,
        "title": chart.title,
        "unit": chart.unit,
        "log": chart.log,
        "traces": traces,
        "lines": _lines(chart, runs),
    }


def _lines(chart: Chart, runs: list[Run]) -> list[dict[str, Any]]:
    """Values that the curves are held against."""
    if chart.id == "norm":
        limits = {run.arguments().get("--clip-grad") for run in runs}
        return [{"y": limit, "text": f"clipped at {limit:g}"} for limit in limits if limit]
    if chart.id == "memory":
        peaks = {run.history.starts[-1].get("planned_peak") for run in runs}
        return [{"y": peak / GIB, "text": "planned"} for peak in sorted(filter(None, peaks))]
    return []


def _step_times(runs: list[Run]) -> dict[str, Any]:
    traces = []
    for number, run in enumerate(runs):
        # Of fewer steps a percentile says nothing.
        edges = buckets(len(run.seconds), min(200, max(1, len(run.seconds) // 20)))
        rows = percentiles(run.seconds, edges, SHARES)
        ends = run.iterations[edges[1:] - 1]
        for share, row in zip(SHARES, rows, strict=True):
            traces.append(trace(number, f"{share:g} % take no longer", (ends, row), "line"))
    return {
        "id": "times",
        "title": "Step time",
        "unit": "seconds",
        "log": True,
        "traces": traces,
        "lines": [],
    }


def _slowest_ranks(runs: list[Run]) -> dict[str, Any]:
    traces = []
    for number, run in enumerate(runs):
        events = run.history.ranks
        curve = (
            np.array([event["iteration"] for event in events], dtype=int),
            np.array([event["ratio"] for event in events], dtype=float),
        )
        if events:
            traces.append(trace(number, "slowest rank", curve, "points"))
    return {
        "id": "ranks",
        "title": "Slowest rank",
        "unit": "its own time over the median",
        "log": False,
        "traces": traces,
        "lines": [],
    }


def trace(run: int, name: str, curve: Curve, style: str) -> dict[str, Any]:
    """A curve as the page draws it, thinned out."""
    iterations, values = curve
    kept = thinned(values)
    return {
        "run": run,
        "name": name,
        "style": style,
        "x": iterations[kept].tolist(),
        "y": numbers(values[kept]),
        "logged": len(values),
    }


def numbers(values: np.ndarray) -> list[float | None]:
    """Five significant digits, and null for what is not finite."""
    return [float(f"{v:.5g}") if np.isfinite(v) else None for v in values.tolist()]


def axis(run: Run) -> dict[str, list[float]]:
    """Iteration to tokens and hours, at enough steps to lay a line between."""
    kept = np.unique(np.linspace(0, len(run.iterations) - 1, 1000).astype(int))
    begun = min(start["launched"] for start in run.history.starts)
    return {
        "steps": run.iterations[kept].tolist(),
        "tokens": run.tokens[kept].tolist(),
        "hours": [round(float(t - begun) / 3600, 6) for t in run.times[kept]],
    }


def imbalance(run: Run) -> dict[str, Any] | None:
    """MaxVio by layer over the steps."""
    iterations, rows = run.violations()
    if not len(iterations) or not rows.shape[1]:
        return None
    edges = buckets(len(iterations), COLUMNS)
    return {
        "x": iterations[edges[1:] - 1].tolist(),
        "y": run.layers,
        "z": [numbers(row) for row in worst(rows, edges)],
        "logged": len(iterations),
    }


def loads(run: Run) -> dict[str, Any] | None:
    """By layer, the load of each expert over its mean, and its bias, over the pictures."""
    pictures = run.history.loads
    if not pictures:
        return None
    cells = len(run.layers) * len(pictures[0]["counts"][0])
    most = max(2, CELLS // (2 * cells))
    kept = np.unique(np.linspace(0, len(pictures) - 1, most).astype(int))
    counts = np.array([pictures[n]["counts"] for n in kept], dtype=float)  # [P, L, E]
    mean = np.maximum(counts.mean(axis=2, keepdims=True), 1e-9)
    bias = np.array([pictures[n]["bias"] for n in kept], dtype=float)

    def of_layers(values: np.ndarray, digits: int) -> list[list[list[float]]]:
        rounded: list[list[list[float]]] = np.round(values.transpose(1, 2, 0), digits).tolist()
        return rounded

    return {
        "layers": run.layers,
        "x": [pictures[n]["iteration"] for n in kept],
        "load": of_layers(counts / mean, 2),
        "bias": of_layers(bias, 5),
    }


def sources(run: Run) -> list[dict[str, Any]]:
    """The share of each source in the tokens given since the event before: the phases of data."""
    events = run.history.data
    names = sorted({name for event in events for name in event["sources"]})
    if len(names) < 2:
        return []
    given = np.array([[e["sources"].get(n, {}).get("tokens", 0) for n in names] for e in events])
    new = np.diff(given, axis=0, prepend=np.zeros((1, len(names))))
    edges = buckets(len(new), COLUMNS)
    sums = np.array([new[a:b].sum(axis=0) for a, b in pairwise(edges)])
    shares = sums / np.maximum(sums.sum(axis=1, keepdims=True), 1)
    ends = [events[end - 1]["iteration"] for end in edges[1:]]
    return [
        {"name": name, "x": ends, "y": numbers(column)}
        for name, column in zip(names, shares.T, strict=True)
    ]


def marks(run: Run) -> list[dict[str, Any]]:
    """What happened beside the steps."""
    found = []
    for start in run.history.starts[1:]:
        found.append(("restart", start["iteration"], f"restart behind {start['iteration']}"))
    for save in run.history.saves:
        found.append(("save", save["iteration"], f"saved in {save['seconds']:.3g} s"))
    for alarm in run.history.alarms:
        if alarm.get("iteration") is not None:
            found.append(("alarm", alarm["iteration"], str(alarm.get("line", alarm["what"]))))
    for step in run.history.steps:
        if not step["applied"]:
            found.append(("left out", step["iteration"], "the step was not applied"))
    return [{"kind": kind, "i": i, "text": text} for kind, i, text in found]
