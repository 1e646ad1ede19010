"""What is installed is found, and what is half there is named, in one line with the way out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from megatron_trinity.upstream import installed as module
from megatron_trinity.upstream.installed import Installed, can_compile
from tests.cuda_start.machine import STAND_INS
from tests.paths import ROOT

LOOK = """
import dataclasses, json
from megatron_trinity.errors import TrinityError
from megatron_trinity.upstream.installed import find_installed
try:
    print(json.dumps(dataclasses.asdict(find_installed())))
except TrinityError as error:
    print(json.dumps(str(error)))
"""


def look(*folders: Path) -> object:
    path = os.pathsep.join(map(str, (ROOT, *folders)))
    process = subprocess.run(
        [sys.executable, "-c", LOOK],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stderr == ""
    return json.loads(process.stdout)


@pytest.mark.parametrize("packages", [(), ("transformer_engine", "apex")])
def test_what_is_there_is_found(packages: tuple[str, ...]) -> None:
    found = look(*(STAND_INS / package for package in packages))
    te = "transformer_engine" in packages
    assert found == asdict(
        Installed(
            transformer_engine="2.20.2" if te else None,
            apex="apex" in packages,
            wgrad_fusion="apex" in packages,
            triton=can_compile() and module._there("triton"),
        )
    )


INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]==2.20.2', or pip uninstall"
TE, TE_TORCH = "transformer_engine/__init__.py", "transformer_engine/pytorch/__init__.py"
APEX, MULTI_TENSOR = "apex/__init__.py", "apex/multi_tensor_apply/__init__.py"
SYMBOL = "raise ImportError('/site/x.so: undefined symbol: _ZN3c105ErrorC2E')"

# The errors are those of the published packages in that state.
BROKEN = {
    "the empty package": (
        {TE: "raise RuntimeError('Found empty `transformer-engine` meta package installed.')"},
        f"Transformer Engine is installed without its part for torch: {INSTALL} ",
    ),
    "without its part for torch": (
        {
            TE: "import warnings; warnings.warn('no extension', RuntimeWarning)",
            TE_TORCH: "raise FileNotFoundError('Could not find shared object file.')",
        },
        f"Transformer Engine is installed without its part for torch: {INSTALL} ",
    ),
    "for another torch": (
        {TE: "", TE_TORCH: SYMBOL},
        f"Transformer Engine was built for another torch than {torch.__version__.split('+')[0]}",
    ),
    "parts of two versions": (
        {TE: "", TE_TORCH: "raise AssertionError('package version mismatch.\\nFound 2.1, 2.2.')"},
        "Transformer Engine cannot be imported (package version mismatch. Found 2.1, 2.2): "
        f"{INSTALL} ",
    ),
    "without what it needs": (
        {TE: "", TE_TORCH: "import onnxscript_that_is_not_there"},
        "Transformer Engine cannot be imported (No module named 'onnxscript_that_is_not_there')",
    ),
    "PyPI's apex": (
        {APEX: "raise SystemExit('a web toolkit was imported')", "apex/models/__init__.py": ""},
        "the package apex that is installed is not NVIDIA's, but PyPI's of the same name, which "
        "megatron-core would take for it: pip uninstall apex, and build NVIDIA's from ",
    ),
    "Apex without kernels": (
        {APEX: "", MULTI_TENSOR: ""},
        "Apex is installed without its kernels (amp_C)",
    ),
    "Apex for another torch": (
        {APEX: "", MULTI_TENSOR: "", "amp_C.py": SYMBOL},
        "Apex's amp_C was built for another torch than ",
    ),
}


@pytest.mark.parametrize("state", BROKEN)
def test_what_is_half_there_is_named(tmp_path: Path, state: str) -> None:
    files, told = BROKEN[state]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    message = look(tmp_path)
    assert isinstance(message, str)
    assert message.startswith(told)
    assert "\n" not in message


def test_the_run_ends_with_that_line(tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("")
    start = (
        "from tests.cuda_start.machine import report_cuda; report_cuda(); "
        "from megatron_trinity.errors import run_command; "
        "from pretrain_trinity import main; run_command(main)"
    )
    process = subprocess.run(
        [sys.executable, "-c", start, "--preset", "nano"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    assert process.stderr.startswith("error: the package apex that is installed is not NVIDIA's")
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("compilers", "headers", "expected"),
    [(["gcc"], True, True), (["clang"], True, True), ([], True, False), (["gcc"], False, False)],
)
def test_triton_needs_a_compiler(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    compilers: list[str],
    headers: bool,
    expected: bool,
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(module.shutil, "which", lambda name: name if name in compilers else None)
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    if headers:
        (tmp_path / "Python.h").touch()
    assert can_compile() is expected


def test_without_cuda_they_are_not_looked_at() -> None:
    """A run on a CPU has none of their kernels, whatever is installed."""
    start = (
        "from megatron_trinity.upstream import adapt_megatron; adapt_megatron(); "
        "from megatron.core.extensions.transformer_engine import HAVE_TE; "
        "from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE; "
        "print(HAVE_TE, HAVE_APEX_OR_TE)"
    )
    folders = (ROOT, STAND_INS / "transformer_engine", STAND_INS / "apex")
    process = subprocess.run(
        [sys.executable, "-c", start],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.split() == ["False", "False"]
