"""The site of docs/ is built, and what is wrong in it is an error."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT

pytestmark = [pytest.mark.docs, pytest.mark.slow]


def build(python: Path, project: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """As `scripts/docs.sh` does, of a copy as well."""
    return subprocess.run(
        [python, "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=project,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_site_is_built(docs_python: Path, tmp_path: Path) -> None:
    done = build(docs_python, ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / f"site/{page.stem}.html").is_file()
    model = (tmp_path / "site/model.html").read_text()
    assert model.count("<math") > 20
    assert "arithmatex" not in model  # no equation is left as it was written


def test_what_is_wrong_fails(docs_python: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "docs/alone.md").write_text("# In no menu\n")
    with (tmp_path / "docs/index.md").open("a") as index:
        index.write("[gone](gone.md) [nowhere](training.md#nowhere)\n")
    done = build(docs_python, tmp_path, tmp_path / "site")
    assert done.returncode == 1
    for wrong in ("alone.md", "gone.md", "#nowhere"):
        assert wrong in done.stderr
    assert "3 warnings in strict mode" in done.stdout + done.stderr
