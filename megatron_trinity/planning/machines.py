"""The GPUs that plans are made for, and what is assumed of how well they are used."""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

import yaml

from megatron_trinity.errors import UsageError

_FILE = resources.files("megatron_trinity") / "planning" / "machines.yaml"


@dataclass(frozen=True)
class Machine:
    """A GPU; units as in `machines.yaml`."""

    name: str
    memory: float
    bf16: float
    fp8: float
    bandwidth: float
    nvlink: float
    network: float
    source: str


@dataclass(frozen=True)
class Assumptions:
    """Shares of the maker's figures that a run gets, and what memory is not ours.

    None has been measured here; `docs/planner.md` says what each is about.
    """

    products: float = 0.65
    grouped: float = 0.55
    attention: float = 0.45
    fp8: float = 0.55
    bandwidth: float = 0.80
    nvlink: float = 0.70
    network: float = 0.75
    overlap: float = 0.90
    reserved: float = 6e9

    def told(self) -> list[str]:
        """Each in words."""
        return [
            f"products of matrices at {self.products:.0%} of the peak, of routed experts at "
            f"{self.grouped:.0%}, in FP8 at {self.fp8:.0%} of its own, attention at "
            f"{self.attention:.0%}",
            f"memory at {self.bandwidth:.0%}, NVLink at {self.nvlink:.0%}, the network at "
            f"{self.network:.0%} of their bandwidth",
            f"{self.overlap:.0%} of the backward pass can hide gradients and weights on the wire; "
            "all other traffic is waited for",
            f"{self.reserved / 1e9:g} GB for CUDA, NCCL, kernels and gaps between allocations",
            "each expert gets as many tokens, and sequences are one document",
        ]


def machines() -> dict[str, Machine]:
    """By name."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(_FILE.read_text())
    names = {field.name for field in fields(Machine)}
    for name, entry in found.items():
        assert entry.keys() == names, f"machines.yaml: {name} has {sorted(entry)}"
    return {name: Machine(**entry) for name, entry in found.items()}


def machine(name: str) -> Machine:
    """Raises: UsageError: it is not known."""
    found = machines()
    if name not in found:
        raise UsageError(f"--gpu {name}: not known; there are {', '.join(found)}")
    return found[name]
