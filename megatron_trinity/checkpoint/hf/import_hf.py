"""An AfMoE directory of Hugging Face as a Megatron checkpoint: weights alone, for any layout."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlan

from megatron_trinity.checkpoint.conversion.slices import overlaps, slices
from megatron_trinity.checkpoint.conversion.staging import resumable_staging
from megatron_trinity.checkpoint.conversion.tasks import Task, run_tasks
from megatron_trinity.checkpoint.hf.config import args_from_hf_config
from megatron_trinity.checkpoint.hf.files import TOKENIZER_CONFIG, carry_over, files_to_carry
from megatron_trinity.checkpoint.hf.import_files import (
    FileJob,
    Source,
    WrittenFile,
    write_import_file,
)
from megatron_trinity.checkpoint.hf.mapping import Entry
from megatron_trinity.checkpoint.hf.source import HfDirectory, open_hf_directory
from megatron_trinity.checkpoint.iterations import RELEASE
from megatron_trinity.checkpoint.torch_dist.write import (
    TensorSlice,
    finish,
    keep,
    move_into_place,
    object_items,
    plan_files,
    write_file,
)
from megatron_trinity.checkpoint.whole.hold import holding
from megatron_trinity.data.manifest import refuse_existing
from megatron_trinity.model.config import padded_vocab_size
from megatron_trinity.progress import Progress, SilentProgress
from megatron_trinity.upstream.checkpoint_tracker import TRACKER

CARRIED = "tokenizer"
"""Directory beside it with the tokenizer, the chat template and `generation_config.json`."""

DTYPE_FLAGS = {"fp32": torch.float32, "bf16": torch.bfloat16}
FILE_SHARE, SLICE_SHARE = 2, 16
"""A process's memory has room for so many files, and for so many slices."""


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        written: bytes of tensors.
        source: type of the matrices in the directory.
        matrices: type of the matrices in the checkpoint.
        nonfinite: name of a Hugging Face tensor to its values that are not finite, if any.
        overflowed: the same of those that were finite before they were converted.
        rounded: the same of finite values that converting has changed.
    """

    written: int
    source: torch.dtype
    matrices: torch.dtype
    nonfinite: Counter[str]
    overflowed: Counter[str]
    rounded: Counter[str]


def import_hf(
    hf: Path,
    save: Path,
    dtype: str | None = None,
    memory_bytes: int = 2 * 2**30,
    workers: int = 1,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    show: Callable[[int | None], Progress] = SilentProgress,
) -> Imported:
    """Write a checkpoint of the model in `hf` under `save`; it appears whole or not at all.

    Args:
        hf: AfMoE directory with experts in either form, in one safetensors file or several.
        save: directory of checkpoints.
        dtype: `fp32` or `bf16` for matrices, by default as they are, and fp32, which holds each
            of their values, for those in fp16. Vectors become fp32.
        memory_bytes: for values in all processes together.
        workers: processes.
        allow_nonfinite: take values that are not finite.
        overwrite: replace a checkpoint.
        show: makes the progress display, given the bytes in all.

    Raises:
        TrinityError: what is in `hf` is not one whole model, a run holds `save`, or a path is not
            usable.
    """
    source = open_hf_directory(hf)
    assert source.dtype is not None
    target = save / RELEASE
    if not overwrite:
        refuse_existing([save / TRACKER, target, save / CARRIED], "is not replaced")
    matrices = DTYPE_FLAGS[dtype] if dtype else _type_of_runs(source.dtype)
    args = _args(source, matrices, save)
    files = list(_files(source, args.padded_vocab_size, matrices, memory_bytes // workers))
    needed = sum(piece.nbytes for file in files for piece, _ in file)
    fingerprint = _fingerprint(source, files)
    with holding(save), resumable_staging(target, fingerprint, needed) as staging:
        whole, carried = staging / RELEASE, staging / CARRIED
        for directory in (whole, carried):
            directory.mkdir(exist_ok=True)
        common, resolve = object_items(_objects(source, args))
        items = [[piece.write_item() for piece, _ in file] for file in files]
        plans, metadata = plan_files(whole, [*items, common])
        tasks = [
            Task(
                f"file-{number:05d}",
                sum(piece.nbytes for piece, _ in file),
                FileJob(whole, plan, _sources_of(plan, file), allow_nonfinite),
            )
            for number, (file, plan) in enumerate(zip(files, plans, strict=False))
        ]
        outcomes: list[WrittenFile] = run_tasks(
            write_import_file,
            tasks,
            staging,
            workers,
            show(needed),
            settle=lambda outcome: keep(whole, outcome.results),
        )
        results = [written.results for written in outcomes]
        finish(whole, metadata, [*results, write_file(whole, plans[-1], resolve)])
        if carry_over(hf, carried):
            if (save / CARRIED).exists():
                (save / CARRIED).rename(staging / "replaced tokenizer")
            carried.rename(save / CARRIED)
        move_into_place(whole, target, staging / "replaced", save / TRACKER)
    return Imported(
        needed,
        source.dtype,
        matrices,
        nonfinite=sum((written.nonfinite for written in outcomes), Counter()),
        overflowed=sum((written.overflowed for written in outcomes), Counter()),
        rounded=sum((written.rounded for written in outcomes), Counter()),
    )


def _type_of_runs(dtype: torch.dtype) -> torch.dtype:
    """A type of matrices that runs have, and that holds every value of `dtype`."""
    return dtype if dtype in DTYPE_FLAGS.values() else torch.float32


def _args(source: HfDirectory, matrices: torch.dtype, save: Path) -> Namespace:
    flags = ["--bf16"] if matrices == torch.bfloat16 else []
    if not (source.path / TOKENIZER_CONFIG).is_file():
        flags += ["--tokenizer-type", "NullTokenizer"]
    args = args_from_hf_config(source.config, *flags)
    args.tokenizer_model = str((save / CARRIED).resolve()) if files_to_carry(source.path) else None
    args.padded_vocab_size = padded_vocab_size(args)
    return args


def _objects(source: HfDirectory, args: Namespace) -> dict[str, Any]:
    """What a checkpoint has beside tensors, by Megatron's keys of sharded objects."""
    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "expert_bias_momentum": False,
        },
    }
    objects: dict[str, Any] = {"common_state/shard_0_1": common}
    for entry in source.table:
        # Megatron's linear layers look for the extra state that they have with Transformer Engine.
        if ".linear_" in entry.trinity:
            experts = entry.shape[0] if len(entry.shape) == 3 else 1
            key = entry.trinity.removesuffix("weight") + "_extra_state"
            objects |= {f"{key}/shard_{number}_{experts}": None for number in range(experts)}
    return objects


Planned = tuple[TensorSlice, tuple[Source, ...]]


def _files(
    source: HfDirectory, padded_vocab: int, matrices: torch.dtype, memory: int
) -> Iterator[list[Planned]]:
    """Slices of the whole checkpoint, file by file."""
    file: list[Planned] = []
    size = 0
    for entry in source.table:
        shape = entry.padded(padded_vocab)
        dtype = torch.float32 if len(shape) == 1 else matrices
        for part in slices(shape, dtype.itemsize, memory // SLICE_SHARE):
            piece = TensorSlice(entry.trinity, shape, dtype, part)
            if file and size + piece.nbytes > memory // FILE_SHARE:
                yield file
                file, size = [], 0
            file.append((piece, _sources(source, entry, piece)))
            size += piece.nbytes
    yield file


def _sources(source: HfDirectory, entry: Entry, piece: TensorSlice) -> tuple[Source, ...]:
    return tuple(
        Source(found.hf, source.tensors[found.hf], found.hf_row, found.row, found.rows)
        for found in overlaps(entry.pieces, piece.part)
    )


def _sources_of(plan: SavePlan, file: Sequence[Planned]) -> dict[Any, tuple[Source, ...]]:
    return {item.index: found for item, (_, found) in zip(plan.items, file, strict=True)}


def _fingerprint(source: HfDirectory, files: Sequence[Sequence[Planned]]) -> list[Any]:
    """All that the files depend on: where everything comes from, and the sources' state."""
    state = {file: file.stat() for file in {stored.file for stored in source.tensors.values()}}
    return [
        [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in sorted(state.items())],
        [[str(piece) for piece, _ in file] for file in files],
        source.config.to_json_string(),
    ]
