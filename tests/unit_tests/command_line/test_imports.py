"""Command lines answer `--help` at once, and the package stands without them."""

from __future__ import annotations

import subprocess
import sys

from tests.paths import ROOT

PACKAGE = ROOT / "megatron_trinity"
FOLDER = PACKAGE / "command_line"


def test_importing_them_imports_nothing_large() -> None:
    names = [f"megatron_trinity.command_line.{file.stem}" for file in FOLDER.glob("[!_]*.py")]
    assert names
    program = f"import sys, {', '.join(names)}; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert set(names) <= loaded
    assert not loaded & {"torch", "megatron", "transformers", "numpy", "rich"}


def test_nothing_else_in_the_package_imports_them() -> None:
    others = [file for file in PACKAGE.rglob("*.py") if FOLDER not in file.parents]
    assert others
    assert not [file for file in others if "megatron_trinity.command_line" in file.read_text()]
