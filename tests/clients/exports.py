"""Exports of a small model, and programs of clients that read them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.paths import ROOT
from tests.trinity import afmoe_config

CONFIG = afmoe_config(vocab_size=300)
TEXT = "the sky over the harbour was grey, and def mean(values): return sum(values)"
LIMIT = 300


def export(rank: int, world_size: int, root: Path) -> None:
    """Write `fp32` and `bf16` from `random`, with the tokenizer."""
    from megatron_trinity.checkpoint.hf.export_hf import export_hf
    from megatron_trinity.checkpoint.hf.import_hf import import_hf

    import_hf(root / "random", root / "megatron")
    for dtype in ("fp32", "bf16"):
        export_hf(root / "megatron", root / dtype, dtype=dtype, tokenizer=root / "tokenizer")


def offline(home: Path) -> dict[str, str]:
    """The environment of a program that uses no network and no GPU."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def client(python: Path, home: Path, *words: str | Path) -> str:
    """What a command prints that runs offline, in the environment of the clients."""
    return printed(python, *words, cwd=ROOT / "tests/clients", env=offline(home))


def printed(*words: str | Path, cwd: Path, env: Mapping[str, str]) -> str:
    """What a command prints that has to end well."""
    done = subprocess.run(
        words,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
