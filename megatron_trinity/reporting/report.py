"""The page of one run or several, in one file that needs no network."""

from __future__ import annotations

import html
import json
import shlex
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from megatron_trinity.reporting.charts import axis, charts, imbalance, loads, marks, sources
from megatron_trinity.reporting.goodput import goodput
from megatron_trinity.reporting.run import Run, differences

_FILES = resources.files("megatron_trinity.reporting") / "page"


def page(runs: list[Run], refresh: float | None = None) -> str:
    """HTML, with the library that draws and all data in it.

    Args:
        refresh: seconds after which a browser reads the file again; None for never.
    """
    from plotly.offline import get_plotlyjs

    content = {
        "runs": [_run(run) for run in runs],
        "charts": charts(runs),
        "differences": [
            {"flag": flag, "values": ["" if v is None else str(v) for v in values]}
            for flag, values in (differences(runs) if len(runs) > 1 else [])
        ],
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    # What ends a script ahead of its time cannot stand in it.
    data = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    title = ", ".join(run.name for run in runs)
    parts = {
        "{{refresh}}": f'<meta http-equiv="refresh" content="{refresh:g}">' if refresh else "",
        "{{style}}": (_FILES / "page.css").read_text(),
        "{{plotly}}": get_plotlyjs(),
        "{{data}}": data,
        "{{script}}": (_FILES / "page.js").read_text(),
    }
    text = (_FILES / "page.html").read_text().replace("{{title}}", html.escape(title))
    for mark, part in parts.items():
        before, _, after = text.partition(mark)
        text = before + part + after
    return text


def _run(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "axis": axis(run),
        "imbalance": imbalance(run),
        "loads": loads(run),
        "sources": sources(run),
        "marks": marks(run),
        "goodput": {part: round(seconds, 3) for part, seconds in goodput(run.history).items()},
        "facts": facts(run),
    }


def facts(run: Run) -> dict[str, str]:
    """What a reader has to know of a run in words."""
    start, steps = run.start, run.history.steps
    git = start["git"]
    commit = "unknown" if git is None else git["commit"][:12] + (", changed" * git["changed"])
    total, active = start["parameters"]
    ends = run.history.ends
    last = ends[-1] if ends else None
    ended = last is not None and last["time"] >= steps[-1]["time"]
    told = "" if last is None else (last["line"] or f"exit code {last['code']}")
    return {
        "steps": f"{steps[-1]['iteration']:,} of {start['train_iters']:,}",
        "tokens": f"{int(run.tokens[-1]):,}",
        "parameters": f"{total:,}, {active:,} for a token",
        "ranks": f"{start['world_size']:,}, the last on {start['host']}",
        "processes": f"{len(run.history.starts)}, {_lost(run)} steps lost",
        "state": f"ended: {told}" if ended else "no end is noted",
        "events missing": str(run.history.missing) if run.history.missing else "",
        "command": "pretrain_trinity.py " + shlex.join(start["command"]),
        "versions": ", ".join(f"{name} {v}" for name, v in start["versions"].items()),
        "code": commit,
        "folder": str(run.folder),
    }


def _lost(run: Run) -> int:
    return sum(event["kind"] == "step" for event in run.history.lost)
