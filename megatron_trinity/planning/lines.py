"""What the log says of a plan: at start, and behind the first step."""

from __future__ import annotations

from argparse import Namespace

from megatron_trinity.planning.kernels import on_cpu, on_gpu
from megatron_trinity.planning.memory import stage_memories
from megatron_trinity.planning.state import StateBytes

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def planned_memory(args: Namespace, on_cuda: bool) -> str:
    """Bytes of the fullest rank, for parsed arguments.

    Args: on_cuda: whether the run has the kernels of a GPU.
    """
    memory = stage_memories(args, on_gpu(args) if on_cuda else on_cpu(args), exact=False)
    fullest = max(memory, key=lambda stage: stage.peak)
    state = fullest.state
    where = f" (stage {fullest.stage})" if args.pipeline_model_parallel_size > 1 else ""
    return (
        f"planned for the fullest rank{where}: weights {short(state.weights)}B, gradients "
        f"{short(state.gradients)}B, optimizer {short(state.optimizer)}B, for backward "
        f"{short(fullest.kept.total())}B; peak {short(fullest.peak)}B, in {fullest.moment}"
    )


def measured_line(
    planned: StateBytes, measured: StateBytes, peak: tuple[int, int] | None = None
) -> str:
    """A rank's state as planned and as it is.

    Args: peak: bytes at once, planned and measured, where they can be.
    """
    parts = [
        _beside(name, getattr(planned, name), getattr(measured, name))
        for name in ("weights", "gradients", "optimizer")
    ]
    if peak is not None:
        parts.append(_beside("peak", *peak))
    return f"> plan and measured, rank 0: {', '.join(parts)}"


def _beside(name: str, planned: int, measured: int) -> str:
    if planned == measured:
        return f"{name} {short(planned)}B as planned"
    off = f" ({measured / planned - 1:+.1%})" if planned else ""
    return f"{name} {short(planned)}B planned, {short(measured)}B measured{off}"


def short(number: float) -> str:
    """Three digits and a prefix: `13.4 G`."""
    for unit, letter in UNITS:
        if number >= unit:
            return f"{number / unit:.3g} {letter}"
    return f"{number:.3g} "
