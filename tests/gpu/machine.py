"""The machine that a subject runs on: a GPU, or a CPU that takes its paths at toy size."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

Size = TypeVar("Size")

PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "H20": 148e12, "A100": 312e12}
"""Of products in bf16 without sparsity, by a part of the device's name (NVIDIA's data sheets)."""

TOY_SIZES = {
    "hidden-size": 64,
    "ffn-hidden-size": 64,
    "num-attention-heads": 4,
    "kv-channels": 16,
    "moe-ffn-hidden-size": 32,
    "vocab-size": 160,
    "seq-length": 32,
    "sliding-window": 8,
    "micro-batch-size": 2,
}
"""Of the trainer's flags, over those of the `tiny` preset."""


@dataclass(frozen=True)
class Machine:
    """Where a subject runs.

    Attributes:
        toy: on a CPU, at toy size.
    """

    toy: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.toy else "cuda")

    @cached_property
    def name(self) -> str:
        return "a CPU with stand-ins" if self.toy else torch.cuda.get_device_name()

    @property
    def peak_flops(self) -> float | None:
        known = [peak for part, peak in PEAK_FLOPS.items() if part in self.name.split()]
        return known[0] if known and not self.toy else None

    def size(self, real: Size, toy: Size) -> Size:
        return toy if self.toy else real

    def seconds(self, work: Callable[[], Any], repetitions: int = 10) -> float:
        """Median of the repetitions, behind two that are not counted."""
        return statistics.median(self.each_second(work, repetitions))

    def each_second(self, work: Callable[[], Any], repetitions: int) -> list[float]:
        repetitions = self.size(repetitions, 2)
        taken = []
        for _ in range(self.size(2, 1)):
            work()
        for _ in range(repetitions):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - began)
        return taken

    def wait(self) -> None:
        if not self.toy:
            torch.cuda.synchronize()

    def peak_bytes(self, work: Callable[[], Any]) -> int:
        """Bytes that a piece of work holds at its peak, above what there was before it.

        On a CPU those of the process, which are coarse at toy size.
        """
        work()  # once for what is made at a first call and stays
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.wait()
        return int(torch.cuda.max_memory_allocated()) - int(before)

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """On a CPU, torch's stand-ins for the kernels that a GPU takes."""
        with ExitStack() as stack:
            if self.toy:
                from tests.gpu_forms import as_if_compiled, as_if_flexible, as_if_kernel

                for form in (as_if_flexible, as_if_kernel, as_if_compiled):
                    stack.enter_context(form())
            yield


def start(machine: Machine, *, groups: bool = True) -> None:
    """This process as the only rank, with megatron-core adapted.

    Args:
        groups: make Megatron's too, which a model's own layout would otherwise.
    """
    from megatron_trinity.command_line.single_rank import single_rank_environment

    os.environ |= single_rank_environment()

    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()

    from megatron.core import parallel_state, tensor_parallel

    if not machine.toy:
        torch.cuda.set_device(0)
    torch.distributed.init_process_group("gloo" if machine.toy else "nccl")
    if not groups:
        return
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def distance(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected, in fp64."""
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm())
