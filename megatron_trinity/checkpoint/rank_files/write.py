"""Megatron's `torch` format: a file for each model-parallel rank, with that rank's own tensors.

What a rank holds is asked of its model, built on the meta device in a fake process group; where the
values are in the whole checkpoint, of the model's sharded state dict.
"""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_trinity.checkpoint.conversion.slices import slices
from megatron_trinity.checkpoint.conversion.tasks import Report
from megatron_trinity.checkpoint.iterations import RELEASE
from megatron_trinity.checkpoint.torch_dist.read import MOMENTUM, TorchDistTensors, tensors_of
from megatron_trinity.checkpoint.whole.manifest import FileSum, file_sum
from megatron_trinity.errors import UsageError
from megatron_trinity.planning.fake_ranks import build_chunks, fake_groups, stage_ranks

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_trinity.model.shards import Held

READ_BYTES = 64 * 2**20
"""Rows of a whole tensor that are read at once, of which a rank may hold some columns."""


@dataclass(frozen=True)
class RankJob:
    """The file of one rank.

    Attributes:
        source: directory of the iteration.
        args: of the trainer, in the layout.
        saved: what the file has beside the model and the optimizer.
        directory: of the new iteration.
        steps: of the optimizer, whose state is written as well; None to write none.
    """

    source: Path
    args: Namespace
    rank: int
    saved: Mapping[str, Any]
    directory: Path
    steps: int | None


def rank_jobs(
    source: TorchDistTensors,
    args: Namespace,
    saved: Mapping[str, Any],
    directory: Path,
    steps: int | None,
) -> Iterator[tuple[RankJob, int]]:
    """A job for each file, and its bytes of tensors, without the optimizer's.

    Raises:
        UsageError: the format cannot hold the layout.
    """
    tensor, expert_tensor = args.tensor_model_parallel_size, args.expert_tensor_parallel_size
    if tensor % expert_tensor:
        raise UsageError(
            f"--format torch names files by TP, PP and EP ranks: etp={expert_tensor} has to divide "
            f"tp={tensor}; use --format torch_dist"
        )
    for rank in file_ranks(args):
        with fake_groups(args, rank) as groups:
            nbytes = sum(
                math.prod(held.shape) * source.dtype(held.parts[0].key).itemsize
                for chunk in build_chunks(args, groups)
                for held in _held(source, chunk).values()
            )
        yield RankJob(source.path, args, rank, saved, directory, steps), nbytes


def file_ranks(args: Namespace) -> list[int]:
    """A rank for each file: the first with its tensor-, pipeline- and expert-parallel ranks."""
    tensor = args.tensor_model_parallel_size
    experts, expert_tensor = args.expert_model_parallel_size, args.expert_tensor_parallel_size
    first: dict[tuple[int, int, int], int] = {}
    for stage, ranks in enumerate(stage_ranks(args)):
        for number, rank in enumerate(ranks):
            first.setdefault((stage, number % tensor, number // expert_tensor % experts), rank)
    return sorted(first.values())


def write_rank_file(job: RankJob, report: Report) -> tuple[str, FileSum]:
    """Write the file of one rank; returns its path in the directory, and its sum."""
    from megatron.training.checkpointing import get_checkpoint_name

    source = tensors_of(job.source)
    with fake_groups(job.args, job.rank) as groups:
        iteration = job.saved["iteration"]
        chunks = build_chunks(job.args, groups)
        models = [_state(source, chunk, report) for chunk in chunks]
        state = {} if job.steps is None else _optimizer(source, job, chunks)
        named = Path(get_checkpoint_name("", iteration, release=job.directory.name == RELEASE))
    keys = ["model"] if len(models) == 1 else [f"model{number}" for number in range(len(models))]
    name = str(named.relative_to(named.parts[0]))
    path = job.directory / name
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as stream:
        torch.save({**job.saved, **dict(zip(keys, models, strict=True)), **state}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    return name, file_sum(path)


def _held(source: TorchDistTensors, chunk: Any) -> dict[str, Held]:
    """Tensors of a chunk; without SMEBU's momentum if that was not saved: it starts from zero."""
    from megatron_trinity.model.shards import held_tensors

    metadata = {MOMENTUM.removeprefix("."): source.has_momentum}
    return held_tensors(chunk, metadata)


def _state(source: TorchDistTensors, chunk: Any, report: Report) -> dict[str, Any]:
    """What `state_dict_for_save_checkpoint` would give on that rank."""
    held = _held(source, chunk)
    state: dict[str, Any] = {}
    for name, value in chunk.state_dict_for_save_checkpoint().items():
        if name in held:
            state[name] = _read(source, held[name])
            report(state[name].nbytes)
        elif not isinstance(value, Tensor):  # extra state
            state[name] = value
    return state


def _optimizer(source: TorchDistTensors, job: RankJob, chunks: list[Any]) -> dict[str, Any]:
    from megatron_trinity.checkpoint.rank_files.optimizer import optimizer_state

    def read(part: ShardedTensor) -> Tensor:
        values = torch.zeros(part.local_shape, dtype=source.dtype(part.key))
        _read_box(source, part.key, tuple(part.global_offset), values)
        return values

    assert job.steps is not None
    return {"optimizer": optimizer_state(job.saved["args"], chunks, job.steps, read)}


def _read(source: TorchDistTensors, held: Held) -> Tensor:
    values = torch.zeros(held.shape, dtype=source.dtype(held.parts[0].key))
    for part in held.parts:
        target = values[part.row : part.row + part.rows]
        _read_box(source, part.key, part.offset, target.view(part.shape))
    return values


def _read_box(source: TorchDistTensors, key: str, offset: tuple[int, ...], target: Tensor) -> None:
    """Fill `target`, a box of a tensor; rows that the vocabulary is padded with stay zero."""
    shape = source.shape(key)
    if len(shape) == 1:
        target.copy_(source.tensor(key)[offset[0] : offset[0] + len(target)])
        return
    before, height = (offset[0] * shape[1] if len(shape) == 3 else 0), target.shape[-2]
    first, column = offset[-2:]
    rows = target.reshape(height, -1)  # of one expert, so still a view
    there = min(first + height, shape[-2]) - first
    if there <= 0:
        return
    for part in slices((there, shape[-1]), source.dtype(key).itemsize, READ_BYTES):
        read = source.rows(key, before + first + part.row, part.rows)
        rows[part.row : part.row + part.rows] = read[:, column : column + rows.shape[1]]
