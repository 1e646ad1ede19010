"""What a page and a summary say of a run, beside plain references."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_trinity.errors import UsageError
from megatron_trinity.reporting.charts import axis, charts, imbalance, loads, marks, sources
from megatron_trinity.reporting.goodput import goodput
from megatron_trinity.reporting.history import History
from megatron_trinity.reporting.report import page
from megatron_trinity.reporting.run import Run, differences, open_runs
from megatron_trinity.reporting.series import buckets, percentiles, smoothed, thinned, worst
from megatron_trinity.reporting.summary import summary
from tests.made_runs import EXPERTS, LAYERS, write_run
from tests.paths import ROOT

STEPS = 60


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(write_run(tmp_path / "run", STEPS))


def test_thinning_keeps_ends_and_extremes_of_every_bucket() -> None:
    y = np.random.default_rng(1).normal(size=100_000)
    y[54_321], y[7] = 50.0, -50.0
    y[99] = np.nan
    kept = thinned(y, 400)
    assert len(kept) <= 400
    assert {0, 7, 54_321, len(y) - 1} <= set(kept.tolist())
    for bucket in np.split(np.arange(len(y)), 100):
        inside = y[kept[(kept >= bucket[0]) & (kept <= bucket[-1])]]
        assert np.nanmax(inside) == np.nanmax(y[bucket])
        assert np.nanmin(inside) == np.nanmin(y[bucket])


def test_short_curves_keep_every_point() -> None:
    assert thinned(np.arange(10.0), 10).tolist() == list(range(10))
    assert thinned(np.array([]), 10).tolist() == []


def test_smoothing_is_a_mean_of_what_is_a_number() -> None:
    y = np.array([1.0, 2.0, np.nan, 4.0, 6.0])
    expected = [np.nanmean(y[max(0, n - 2) : n + 1]) for n in range(len(y))]
    assert smoothed(y, 3) == pytest.approx(expected)


def test_buckets_percentiles_and_maxima() -> None:
    y = np.arange(10.0)
    edges = buckets(10, 3)
    assert edges.tolist() == [0, 3, 6, 10]
    parts = [y[0:3], y[3:6], y[6:10]]
    expected = [[np.percentile(part, share) for part in parts] for share in (50, 90)]
    assert percentiles(y, edges, (50, 90)) == pytest.approx(np.array(expected))
    rows = np.stack([y, -y], axis=1)
    assert worst(rows, edges).tolist() == [[2.0, 5.0, 9.0], [0.0, -3.0, -6.0]]


def test_goodput_adds_up_to_the_whole_time(run: Run) -> None:
    parts = goodput(run.history)
    events = [json.loads(line) for line in (run.folder / "events.jsonl").open()]
    whole = events[-1]["time"] - events[0]["launched"]
    assert sum(parts.values()) == pytest.approx(whole, rel=1e-6)
    behind, killed = STEPS // 2, STEPS * 2 // 3
    ran = [e["seconds"] for e in events if e["kind"] == "step"]
    lost = ran[behind:killed]
    assert parts["training"] == pytest.approx(sum(ran) - sum(lost))
    other = [e for e in events[:-1] if e["kind"] in ("save", "evaluation")]
    keys = [(e["kind"], e["iteration"]) for e in other]
    again = sum(e["seconds"] for n, e in enumerate(other) if keys[n] in keys[n + 1 :])
    assert parts["lost"] == pytest.approx(sum(lost) + again)
    assert parts["starting"] == pytest.approx(60)
    assert parts["waiting"] == pytest.approx(60)
    assert goodput(History()) == dict.fromkeys(parts, 0.0)


def test_charts_have_every_point_of_the_run(run: Run) -> None:
    drawn = {chart["id"]: chart for chart in charts([run])}
    loss = drawn["loss"]["traces"]
    assert [trace["name"] for trace in loss] == ["training", "training, mean of 1", "validation"]
    assert loss[0]["x"] == list(range(1, STEPS + 1))
    values = [step["values"]["lm loss"] for step in run.history.steps]
    assert loss[0]["y"] == pytest.approx(values, rel=1e-4)
    assert [line["y"] for line in drawn["norm"]["lines"]] == [1.0]
    assert drawn["memory"]["lines"] == [{"y": 3.0, "text": "planned"}]
    times = drawn["times"]["traces"]
    of_bucket = run.seconds[20:40]
    assert [t["y"][1] for t in times] == pytest.approx(np.percentile(of_bucket, (50, 90, 99)), 1e-4)
    assert all(len(trace["x"]) == len(trace["y"]) for c in drawn.values() for trace in c["traces"])
    steps = axis(run)
    assert steps["tokens"] == [8192 * n for n in range(1, STEPS + 1)]
    assert steps["hours"] == sorted(steps["hours"])


def test_heat_maps_of_layers_and_experts(run: Run) -> None:
    heat = imbalance(run)
    assert heat is not None
    expected = np.array([step["max violation"] for step in run.history.steps]).T
    assert np.array(heat["z"]) == pytest.approx(expected, rel=1e-4)
    assert heat["y"] == [*range(2, 2 + LAYERS)]
    of_experts = loads(run)
    assert of_experts is not None
    counts = np.array(run.history.loads[-1]["counts"], dtype=float)
    relative = counts / counts.mean(axis=1, keepdims=True)
    last = np.array([[row[-1] for row in layer] for layer in of_experts["load"]])
    assert last.shape == (LAYERS, EXPERTS)
    assert last == pytest.approx(relative, abs=0.006)


def test_marks_and_sources(run: Run) -> None:
    kinds = [mark["kind"] for mark in marks(run)]
    assert (kinds.count("restart"), kinds.count("alarm"), kinds.count("save")) == (1, 1, 20)
    assert sources(run) == []
    run.history.data = [
        {"iteration": n, "sources": {"a": {"tokens": 6 * n}, "b": {"tokens": 2 * n}}}
        for n in (1, 2)
    ]
    assert [one["y"] for one in sources(run)] == [[0.75, 0.75], [0.25, 0.25]]


def test_the_slowest_rank_is_a_curve(run: Run) -> None:
    assert "ranks" not in {chart["id"] for chart in charts([run])}
    run.history.ranks = [{"iteration": 5, "ratio": 1.25}, {"iteration": 10, "ratio": 1.5}]
    [chart] = [chart for chart in charts([run]) if chart["id"] == "ranks"]
    assert (chart["traces"][0]["x"], chart["traces"][0]["y"]) == ([5, 10], [1.25, 1.5])


def test_runs_of_one_name_and_what_differs(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a" / "run", 4),
        write_run(tmp_path / "b" / "run", 4, lr=0.1, more=True),
    ]
    runs = open_runs(folders)
    assert [run.name for run in runs] == ["a/run", "b/run"]
    assert differences(runs) == [("--lr", [0.004, 0.1]), ("--more", [None, True])]


def test_a_page_holds_what_nothing_can_break_out_of(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a <b> & c", 4, name="</script><b>")
    text = page(open_runs([folder]), refresh=15)
    assert "<title>a &lt;b&gt; &amp; c</title>" in text
    assert '<meta http-equiv="refresh" content="15">' in text
    assert "{{" not in re.sub(r"(?s)<script>.*?</script>", "", text)
    [data] = re.findall(r'(?s)<script type="application/json" id="data">(.*?)</script>', text)
    assert json.loads(data)["runs"][0]["name"] == "a <b> & c"


def test_a_summary_in_words(run: Run) -> None:
    rows = summary(run)
    assert rows["steps"] == f"{STEPS} of {STEPS}"
    assert rows["processes"] == f"2, {STEPS * 2 // 3 - STEPS // 2} steps lost"
    assert rows["alarms"].startswith("1; iteration 40 is a spike")
    assert rows["state"] == "ended: exit code 0"
    assert rows["validation loss"].endswith(f" at {STEPS}")


def test_a_run_without_a_step_is_told(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"kind":"end","code":1,"iteration":null,"line":"x"}\n')
    with pytest.raises(UsageError, match="no step yet"):
        Run(tmp_path)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/report.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_the_command(tmp_path: Path) -> None:
    folder = str(write_run(tmp_path / "run", 4))
    done = command(folder, "--out", str(tmp_path / "new" / "page.html"))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "new" / "page.html").read_text().startswith("<!doctype html>")
    said = command(folder)
    assert said.returncode == 0
    assert said.stdout.startswith("run\n  steps ")
    missing = command(str(tmp_path / "nothing"))
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: ")
