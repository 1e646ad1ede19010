"""A run in words and numbers, for a terminal."""

from __future__ import annotations

import numpy as np

from megatron_trinity.reporting.console import digits, time_left
from megatron_trinity.reporting.goodput import goodput
from megatron_trinity.reporting.names import MEMORY, SPEED, THROUGHPUT
from megatron_trinity.reporting.report import facts
from megatron_trinity.reporting.run import Run
from megatron_trinity.reporting.series import window_of

ALARMS = 5
"""That are told, the newest."""


def summary(run: Run) -> dict[str, str]:
    """Rows of a table, by name; "newest" values are means over the last steps."""
    told = facts(run)
    rows = {name: told[name] for name in ("steps", "tokens", "parameters", "ranks")}
    rows["training loss"] = _newest(run, "lm loss")
    for name, (iterations, values) in run.evaluations().items():
        rows[f"{name} loss"] = f"{values[-1]:.5g} at {iterations[-1]:,}"
    rows["gradient norm"] = _newest(run, "grad-norm")
    rows["tokens/s"] = _newest(run, SPEED)
    rows["TFLOP/s"] = _newest(run, THROUGHPUT)
    median, most, almost = map(digits, np.percentile(run.seconds, (50, 95, 99)))
    rows["step time"] = f"median {median} s, 95 % within {most} s, 99 % within {almost} s"
    rows["memory, GiB"] = _newest(run, MEMORY)
    rows["MaxVio"] = _violation(run)
    rows["unused experts"] = _newest(run, "unused experts")
    parts = goodput(run.history)
    whole = sum(parts.values()) or 1.0
    rows["time"] = ", ".join(
        f"{part} {time_left(seconds)} ({seconds / whole:.1%})"
        for part, seconds in parts.items()
        if seconds > 0
    )
    saves = run.history.saves
    rows["saves"] = f"{len(saves)}, the newest {saves[-1]['iteration']:,}" if saves else "none"
    alarms = run.history.alarms
    rows["alarms"] = f"{len(alarms)}" + "".join(f"; {a.get('line', '')}" for a in alarms[-ALARMS:])
    rest = ("processes", "state", "events missing", "code", "command")
    rows |= {name: told[name] for name in rest}
    return {name: text for name, text in rows.items() if text}


def _newest(run: Run, name: str) -> str:
    _, values = run.curve(name)
    if not len(values):
        return ""
    window = window_of(len(values))
    mean = float(values[-window:].mean())
    text = digits(mean) if abs(mean) >= 1000 else f"{mean:.4g}"
    return text + (f" (mean of {window})" if window > 1 else "")


def _violation(run: Run) -> str:
    _, rows = run.violations()
    if not len(rows) or not rows.shape[1]:
        return ""
    means = rows[-window_of(len(rows)) :].mean(axis=0)
    return f"{means.max():.3g} in layer {run.layers[int(means.argmax())]}, mean {means.mean():.3g}"
