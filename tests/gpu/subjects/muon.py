"""Muon: Newton-Schulz against fp64, and a step beside Megatron's and torch's."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.gpu.machine import Machine, distance
from tests.gpu.rows import Row, at_most, beside
from tests.paths import ROOT

BOUNDS = {torch.float32: 3e-5, torch.bfloat16: 2e-2}
"""Of five steps; in bf16 every product is rounded."""
LARGEST = 1.3
"""Singular value that the polynomial of the last step lets through."""


def rows(machine: Machine) -> Iterator[Row]:
    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()
    shapes = {
        "experts of nano": machine.size((32, 256, 1024), (4, 16, 32)),
        "projections of mini": machine.size((4, 2048, 4096), (2, 32, 48)),
        "experts of large": machine.size((8, 3072, 3072), (2, 48, 48)),
    }
    for name, shape in shapes.items():
        yield from values(machine, name, shape)
    yield from benchmark(machine)


def values(machine: Machine, name: str, shape: tuple[int, int, int]) -> Iterator[Row]:
    from megatron_trinity.optimizer.newton_schulz import coefficients, newton_schulz

    steps = coefficients("quintic", 5)
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(shape, generator=generator).to(machine.device)
    expected = newton_schulz(given.double(), steps, torch.float64)
    for dtype, bound in BOUNDS.items():
        got = newton_schulz(given.clone(), steps, dtype)
        case = f"{name}, {str(dtype).removeprefix('torch.')}"
        yield at_most(f"{case}: orthogonalised", distance(got, expected), bound)
    # So that fp64 itself is what it is to be.
    largest = float(torch.linalg.svdvals(expected[0]).max())
    yield at_most(f"{name}, float64: largest singular value", largest, LARGEST, "")


def benchmark(machine: Machine) -> Iterator[Row]:
    """The rows of `benchmarks/muon.py`, a comparison each; it checks that the updates agree."""
    flags = machine.size(["--device", "cuda", "--precision", "bf16", "--layers", "4"], ["--quick"])
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.json"
        command = [sys.executable, "benchmarks/muon.py", *flags, "--json", str(file)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        for row in json.loads(file.read_text()):
            yield beside(row["case"], (row["ours"], row["peer"]), "the peer", row["unit"])
