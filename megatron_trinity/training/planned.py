"""The plan's lines in the log: at start, and beside what the first step has shown."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_trinity.planning.kernels import on_gpu
from megatron_trinity.planning.lines import measured_line
from megatron_trinity.planning.memory import stage_memory
from megatron_trinity.planning.stages import stage_chunks
from megatron_trinity.planning.state import StageState, StateBytes, is_sharded


class PlanCheck:
    """Says once, behind the first step, what was planned of rank 0 and what it holds."""

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._is_told = False

    def step_ended(self, model: Sequence[Any], optimizer: Any) -> None:
        """Print the line, on rank 0, if it has not been."""
        if self._is_told or dist.get_rank() != 0:
            return
        self._is_told = True
        args = self._args
        stage = parallel_state.get_pipeline_model_parallel_rank()
        chunks = stage_chunks(args)[stage]
        planned = StageState(args, stage, chunks).of_rank(*_numbers(args))
        peak = None
        if torch.cuda.is_available():
            memory = stage_memory(args, on_gpu(args), stage, chunks)
            peak = memory.peak, torch.cuda.max_memory_allocated()
        print(measured_line(planned, state_bytes(model, optimizer), peak), flush=True)


def _numbers(args: Namespace) -> tuple[int, int]:
    """Of this rank in the groups that share state."""
    if not is_sharded(args):
        return 0, 0
    dense = parallel_state.get_data_parallel_group(
        with_context_parallel=True, partial_data_parallel=True
    )
    experts = parallel_state.get_expert_data_parallel_group(partial_expert_data_parallel=True)
    return dense.rank(), experts.rank()


def state_bytes(model: Sequence[Any], optimizer: Any) -> StateBytes:
    """What a rank's chunks, in Megatron's `DistributedDataParallel`, and its optimizer hold."""
    buffers = [b for chunk in model for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    weights = {*_storages(p.data for chunk in model for p in chunk.parameters())}
    gradients = {*_storages(buffer.grad_data for buffer in buffers)} - weights
    state = {*_storages(_optimizer_tensors(optimizer))} - weights - gradients
    padding = sum(
        (b.numel - b.numel_unpadded) * (b.param_dtype.itemsize + b.grad_dtype.itemsize)
        for b in buffers
    )
    of_kind = [sum(size for _, size in kind) for kind in (weights, gradients, state)]
    return StateBytes(of_kind[0], of_kind[1], of_kind[2], padding)


def _storages(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """Which, and how large."""
    for tensor in tensors:
        storage = tensor.untyped_storage()
        yield storage._cdata, storage.nbytes()


def _optimizer_tensors(optimizer: Any) -> Iterator[Tensor]:
    """fp32 weights, moments and numbers of steps."""
    if hasattr(optimizer, "units"):  # ours
        for unit in optimizer.units:
            yield from unit.state.values()
        inner = [optimizer.optimizer]
    else:
        chained = getattr(optimizer, "chained_optimizers", [optimizer])
        inner = [part.optimizer for part in chained if not getattr(part, "is_stub_optimizer", 0)]
    for one in inner:
        for group in one.param_groups:
            yield from group["params"]
        for state in one.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
