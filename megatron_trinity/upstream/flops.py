"""Throughput from the FLOPs of the model that is trained."""

from __future__ import annotations

from argparse import Namespace
from typing import Any, Protocol

from megatron_trinity.upstream.registry import Adaptation, rebind

ADAPTATION = Adaptation(
    name="flops",
    symbols=(
        "megatron.training.training.num_floating_point_operations",
        "megatron.training.training.consume_seqlen_stats_in_iteration",
    ),
    reason=(
        "Megatron's count leaves out the output gate and takes every layer for global, so that "
        "windows count as full attention; of packed documents it knows the sum of squared "
        "lengths, from which the pairs within a window cannot be had"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="the loop asks the model for its FLOPs",
)


class FlopCounter(Protocol):
    """Counts the FLOPs of training steps."""

    def consume(self) -> tuple[Any, Any]:
        """Once a step, on every rank: two values of the step, which `flops` gets."""

    def flops(self, sequences: int, first: Any, second: Any) -> float:
        """FLOPs of a step over all ranks, from the sequences of its batch and those values."""


_counter: FlopCounter | None = None


def set_flop_counter(counter: FlopCounter) -> None:
    """Count with `counter` from now on."""
    global _counter
    _counter = counter


def install() -> None:
    """Make the loop ask what `set_flop_counter` has set, if anything."""
    from megatron.training import training

    count = training.num_floating_point_operations
    consume = training.consume_seqlen_stats_in_iteration

    def num_floating_point_operations(
        args: Namespace,
        batch_size: int,
        seqlen_squared_sum_in_batch: Any = None,
        total_real_tokens_in_batch: Any = None,
    ) -> float:
        if _counter is None:
            result: float = count(
                args, batch_size, seqlen_squared_sum_in_batch, total_real_tokens_in_batch
            )
            return result
        return _counter.flops(batch_size, total_real_tokens_in_batch, seqlen_squared_sum_in_batch)

    def consume_seqlen_stats_in_iteration() -> tuple[Any, Any]:
        result: tuple[Any, Any] = consume() if _counter is None else _counter.consume()
        return result

    rebind(count, num_floating_point_operations)
    rebind(consume, consume_seqlen_stats_in_iteration)
