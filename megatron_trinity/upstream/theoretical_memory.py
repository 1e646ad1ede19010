"""Megatron's numbers of parameters and bytes, which are of another model, are not printed."""

from __future__ import annotations

from typing import Any

from megatron_trinity.upstream.registry import Adaptation, rebind

ADAPTATION = Adaptation(
    name="theoretical-memory",
    symbols=("megatron.training.training.report_theoretical_memory",),
    reason=(
        "it counts parameters and bytes of a GPT with its own layers: no output gate, no padding "
        "of buffers, Adam's state for every weight, activations of an attention without windows. "
        "The planner's line has them as they are"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="the report asks the model and the optimizer",
)


def _nothing(*_: Any, **__: Any) -> None:
    """In the place of the report."""


def install() -> None:
    """Print nothing where the loop would."""
    from megatron.training import training

    rebind(training.report_theoretical_memory, _nothing)
