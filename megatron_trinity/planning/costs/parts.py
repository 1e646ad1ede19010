"""The parts of a training step, by their names."""

from __future__ import annotations

KINDS = ("dense layer", "MoE layer, local", "MoE layer, global")
EXPERTS = ", routed experts"
"""Behind the kind of a layer, a part of its own."""

EMBEDDING = "embedding and batch"
HEAD = "head and loss"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
BEHIND = "behind the step"
