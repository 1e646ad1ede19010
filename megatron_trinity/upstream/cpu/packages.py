"""Packages with kernels for GPUs are as good as not installed."""

from __future__ import annotations

import sys

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="cpu-packages",
    symbols=("sys.modules",),
    reason=(
        "megatron-core takes kernels of Transformer Engine and Apex for norms of gradients, the "
        "router, Adam and more wherever it can import them, and they fail on tensors of a CPU: in "
        "a run there, and in tools that stay off the GPUs of their machine"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="megatron-core looks where its tensors are, and not what is installed",
    when="without_cuda",
)

PACKAGES = ("transformer_engine", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")


def install() -> None:
    """Have imports of them fail, unless somebody has imported them on purpose."""
    for package in PACKAGES:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]
