"""The page of a run in a browser: every plot is drawn, with every point, without an error."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_trinity.reporting.report import page
from megatron_trinity.reporting.run import open_runs
from tests.made_runs import EXPERTS, LAYERS, write_run

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

STEPS = 60
EVALUATIONS = 20

PROBE = """<script>
addEventListener("load", () => setTimeout(() => {
  const root = document.documentElement;
  const cards = [...document.querySelectorAll(".card, .tile, header")];
  const wide = cards.filter((one) => one.getBoundingClientRect().right > innerWidth + 1);
  root.dataset.wide = String(wide.length + (root.scrollWidth > innerWidth ? 1 : 0));
  root.dataset.width = String(innerWidth);
  for (const plot of document.querySelectorAll(".plot")) {
    const svg = plot.querySelector(".main-svg");
    const marks = [".js-line[d]", ".point", "image"].map((one) => `.cartesianlayer ${one}`).join();
    plot.dataset.shapes = String(plot.querySelectorAll(marks).length);
    plot.dataset.inside = String(svg && svg.getBoundingClientRect().width <= plot.clientWidth + 1);
  }
}, 3000));
</script></body>"""


class Plots(HTMLParser):
    """The attributes of the page and of each plot."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.root: dict[str, str | None] = {}
        self.plots: dict[str, dict[str, str | None]] = {}
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "html":
            self.root = given
        if tag == "div" and (given.get("id") or "").startswith("plot-"):
            self.plots[str(given["id"]).removeprefix("plot-")] = given


@pytest.fixture(scope="session")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("there is no Chromium; on Debian: apt-get install chromium")
    return found


def opened(browser: str, file: Path, width: int, *flags: str) -> tuple[Plots, list[str]]:
    """The page as it stands when it is drawn, and what the console has said."""
    command = [
        *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *(f"--user-data-dir={file.parent / 'profile'}", "--virtual-time-budget=20000"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={width},900", *flags),
        *("--dump-dom", file.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Plots(done.stdout), said


def write_page(path: Path, folders: list[Path]) -> Path:
    text = page(open_runs(folders))
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=.(?!data:)", text)
    path.write_text(text.replace("</body>", PROBE))
    return path


@pytest.mark.parametrize("width", [1400, 500])
def test_every_plot_has_every_point(browser: str, tmp_path: Path, width: int) -> None:
    file = write_page(tmp_path / "page.html", [write_run(tmp_path / "run", STEPS)])
    found, said = opened(browser, file, width)
    assert said == []
    assert found.root["data-width"] == str(width)
    assert found.root["data-wide"] == "0"
    each = str(STEPS)
    assert {name: one["data-points"] for name, one in found.plots.items()} == {
        "loss": f"{each} {each} {EVALUATIONS}",
        "auxiliary": f"{each} {each}",
        "rates": f"{each} {each}",
        "norm": f"{each} {each}",
        "speed": f"{each} {each}",
        "throughput": f"{each} {each}",
        "times": "3 3 3",
        "violation": f"{each} {each}",
        "dead": each,
        "bias": each,
        "heterogeneity": f"{each} {each}",
        "logits": f"{each} {each}",
        "memory": each,
        "imbalance-0": str(STEPS * LAYERS),
        "load-0": str(STEPS * EXPERTS),
        "biases-0": str(STEPS * EXPERTS),
        "marks": f"1 1 {EVALUATIONS}",
        "goodput": "1 1 1 1 1 1 1",
    }
    assert found.root["data-drawn"] == str(len(found.plots))
    for name, one in found.plots.items():
        # Curves, the markers of evaluations, pictures, bars.
        curves = 1 if "-0" in name else len((one["data-points"] or "").split())
        more = {"loss": EVALUATIONS, "marks": EVALUATIONS - 1}.get(name, 0)
        assert int(one["data-shapes"] or 0) == curves + more, name
        assert one["data-inside"] == "true", name


def test_several_runs_in_the_dark(browser: str, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", STEPS), write_run(tmp_path / "b", STEPS // 2, lr=0.002)]
    found, said = opened(browser, write_page(tmp_path / "p.html", runs), 1400, "--force-dark-mode")
    assert said == []
    assert found.root["class"] == "dark"
    assert found.plots["loss"]["data-points"] == "60 60 20 30 30 15"
    assert {"imbalance-0", "imbalance-1", "load-1"} <= set(found.plots)
