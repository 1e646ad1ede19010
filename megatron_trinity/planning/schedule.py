"""The order of a pipeline rank's forward and backward passes, and what is in flight meanwhile."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """A pass of a rank.

    Attributes:
        chunk: of the model.
        backward: whether it is a backward pass.
        in_flight: micro-batches of each chunk whose forward pass is done or under way, and whose
            backward pass is not done.
    """

    chunk: int
    backward: bool
    in_flight: tuple[int, ...]


def micro_batches(args: Namespace) -> int:
    """Of a step, on each data-parallel rank; of one that grows, what fills the pipeline."""
    if args.global_batch_size is None:
        return int(4 * args.pipeline_model_parallel_size)
    return int(args.global_batch_size // (args.micro_batch_size * args.data_parallel_size))


def warm_up(args: Namespace, stage: int, chunks: int, number: int) -> int:
    """Forward passes ahead of the first backward pass, as Megatron's schedules have them.

    Args: number: of micro-batches.
    """
    behind = args.pipeline_model_parallel_size - stage - 1
    if args.pipeline_model_parallel_size == 1:
        return 0
    if chunks == 1:
        return min(behind, number)
    group = args.microbatch_group_size_per_vp_stage or args.pipeline_model_parallel_size
    return int(min(2 * behind + (chunks - 1) * group, number * chunks))


def passes(args: Namespace, stage: int, chunks: int) -> Iterator[Moment]:
    """The passes of a step, in order: warm-up, one forward and one backward in turn, the rest.

    Of many micro-batches as many as fill the pipeline: what follows is the same again.
    """
    group = args.microbatch_group_size_per_vp_stage or args.pipeline_model_parallel_size
    number = min(micro_batches(args), 4 * max(group, args.pipeline_model_parallel_size))
    forward = _order(number, chunks, group)
    backward = [chunks - 1 - chunk for chunk in forward]
    ahead = warm_up(args, stage, chunks, number)
    in_flight = [0] * chunks
    done = 0
    for position, chunk in enumerate(forward):
        in_flight[chunk] += 1
        yield Moment(chunk, False, tuple(in_flight))
        if position >= ahead:
            yield Moment(backward[done], True, tuple(in_flight))
            in_flight[backward[done]] -= 1
            done += 1
    for chunk in backward[done:]:
        yield Moment(chunk, True, tuple(in_flight))
        in_flight[chunk] -= 1


def _order(number: int, chunks: int, group: int) -> Sequence[int]:
    """Chunks of the forward passes: groups of micro-batches go through one after the other."""
    order: list[int] = []
    for first in range(0, number, group):
        size = min(group, number - first)
        order += [chunk for chunk in range(chunks) for _ in range(size)]
    return order


def idle_share(args: Namespace, chunks: int) -> float:
    """Time that a rank waits at the ends of the pipeline, over that of its work."""
    waits = args.pipeline_model_parallel_size - 1
    return waits / (micro_batches(args) * chunks)
