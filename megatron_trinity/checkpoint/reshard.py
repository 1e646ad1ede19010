"""A checkpoint rewritten without its run: in other files, for another layout, without its state."""

from __future__ import annotations

import copy
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_trinity.checkpoint.conversion.slices import slices
from megatron_trinity.checkpoint.conversion.staging import resumable_staging
from megatron_trinity.checkpoint.conversion.tasks import Report, Task, run_tasks
from megatron_trinity.checkpoint.iterations import METADATA, RELEASE
from megatron_trinity.checkpoint.layout_args import Layout, args_of_layout, layout_of, with_layout
from megatron_trinity.checkpoint.rank_files.write import rank_jobs, write_rank_file
from megatron_trinity.checkpoint.torch_dist.read import COMMON, TorchDistCheckpoint, tensors_of
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
from megatron_trinity.checkpoint.whole.manifest import (
    MANIFEST,
    FileSum,
    faults,
    read_manifest,
    write_manifest,
)
from megatron_trinity.checkpoint.whole.structure import structure_faults
from megatron_trinity.errors import TrinityError, UsageError
from megatron_trinity.progress import Progress, SilentProgress
from megatron_trinity.upstream import adapt_megatron
from megatron_trinity.upstream.checkpoint_tracker import TRACKER

FILE_SHARE, SLICE_SHARE = 3, 16
"""A process's memory has room for so many files, and for so many slices."""

HOW = {False: "--finetune", True: "--no-load-rng, and without --use-distributed-optimizer"}
"""How a run loads what was written as `torch`, without and with the optimizer's state."""

RNG, RERUN = "rng_state/", "rerun_state_machine_state/"
Show = Callable[[int | None], Progress]


@dataclass(frozen=True)
class Resharded:
    """What was written, or would be.

    Attributes:
        target: directory of the iteration.
        nbytes: of tensors.
        files: that hold them.
        notes: what the reader has to know of it, a line each.
    """

    target: Path
    nbytes: int
    files: int
    notes: list[str]


@dataclass(frozen=True)
class _Planned:
    """What is to be written.

    Attributes:
        tasks: of the files that hold tensors.
        work: does a task's job, in any process.
        finish: makes the files that the tasks gave a checkpoint; the argument is what they gave.
        fingerprint: what it depends on beside the source.
        settle: waits until the disk has what a task gave.
        prepare: what another process has to do first.
    """

    tasks: list[Task]
    work: Callable[[Any, Report], Any]
    finish: Callable[[list[Any]], None]
    fingerprint: str
    settle: Callable[[Any], None] | None = None
    prepare: Callable[[], None] | None = None


@dataclass(frozen=True)
class _FileJob:
    source: Path
    directory: Path
    plan: SavePlan


@dataclass(frozen=True)
class _SumJob:
    directory: Path
    name: str
    expected: FileSum


def reshard(
    load: Path,
    save: Path,
    layout: Layout | None = None,
    files: int | None = None,
    ckpt_format: str = "torch_dist",
    optimizer: bool = True,
    memory_bytes: int = 2 * 2**30,
    workers: int = 1,
    dry_run: bool = False,
    show: Show = SilentProgress,
) -> Resharded:
    """Write what is in `load` under `save`; it appears whole or not at all.

    Args:
        load: a run's directory, or one iteration in it.
        save: directory of checkpoints.
        layout: that the stored arguments name; by default the run's own.
        files: how many hold tensors; by default as few as memory allows. For `torch_dist` alone.
        ckpt_format: `torch_dist`; or `torch`, a file a rank.
        optimizer: keep the optimizer's state.
        memory_bytes: for values in all processes together; a rank's file of `torch` is held whole.
        workers: processes.
        dry_run: check all but the checksums, and write nothing.
        show: makes a progress display, given the bytes in all.

    Raises:
        UsageError: so few files are more than memory holds, or the format cannot have the layout.
        TrinityError: there is no checkpoint, it is not whole, the model cannot have the layout, a
            run holds `save`, or a path is not usable.
    """
    source = TorchDistCheckpoint(load)
    notes = _refuse_damaged(source)
    name = source.path.name if source.path.name == RELEASE else f"iter_{source.iteration:07d}"
    target = save / name
    for path in (target, save / TRACKER):
        if path.exists():
            raise TrinityError(f"{path} is there already and is not replaced: name another --save")
    staged = save / f".{name}.part" / name
    if ckpt_format == "torch":
        with_state = optimizer and source.has_optimizer
        steps = int(source.common["optimizer"]["step"]) if with_state else None
        planned = _plan_rank_files(source, staged, layout or layout_of(source.args), steps)
        notes.append(f"load it with --ckpt-format torch {HOW[with_state]}")
    else:
        share = memory_bytes // workers
        common = _common(source, layout, optimizer)
        planned = _plan_torch_dist(source, staged, common, optimizer, files, share)
        if not optimizer:
            notes.append("no optimizer state: load it with --no-load-optim or --finetune")
    needed = sum(task.nbytes for task in planned.tasks)
    done = Resharded(target, needed, len(planned.tasks), notes)
    if dry_run:
        return done
    stat = (source.path / METADATA).stat()
    plan = [str(source.path), stat.st_size, stat.st_mtime_ns, planned.fingerprint]
    with holding(save), resumable_staging(target, plan, needed) as staging:
        staged.mkdir(exist_ok=True)
        _check_sums(source.path, staging, workers, show)
        written = run_tasks(
            planned.work,
            planned.tasks,
            staging,
            workers,
            show(needed),
            planned.settle,
            planned.prepare,
        )
        planned.finish(written)
        move_into_place(staged, target, staging / "replaced", save / TRACKER)
    return done


def _refuse_damaged(source: TorchDistCheckpoint) -> list[str]:
    """Look at everything but contents; a note if there is no manifest to compare those with."""
    has_manifest = (source.path / MANIFEST).is_file()
    of_files = faults(source.path, read_manifest(source.path), False) if has_manifest else ()
    for fault in (*of_files, *structure_faults(source)):
        raise TrinityError(f"{source.path} is not whole: {fault}")
    return [] if has_manifest else [f"{source.path} has no {MANIFEST}: contents are not checked"]


def _check_sums(source: Path, staging: Path, workers: int, show: Show) -> None:
    if not (source / MANIFEST).is_file():
        return
    files = read_manifest(source)
    tasks = [
        Task(f"sum-{number:05d}", expected.bytes, _SumJob(source, name, expected))
        for number, (name, expected) in enumerate(files.items())
    ]
    run_tasks(_check_sum, tasks, staging, workers, show(sum(task.nbytes for task in tasks)))


def _check_sum(job: _SumJob, report: Report) -> None:
    for fault in faults(job.directory, {job.name: job.expected}, checksums=True):
        raise TrinityError(f"{job.directory} is not whole: {fault}")
    report(job.expected.bytes)


def _plan_torch_dist(
    source: TorchDistCheckpoint,
    staged: Path,
    common: dict[str, Any],
    optimizer: bool,
    files: int | None,
    memory: int,
) -> _Planned:
    keys = source.tensor_keys() if optimizer else source.model_state_keys()
    pieces = [
        TensorSlice(key, source.shape(key), source.dtype(key), part)
        for key in keys
        for part in slices(source.shape(key), source.dtype(key).itemsize, memory // SLICE_SHARE)
    ]
    dealt = _deal_out(pieces, _file_count(sum(p.nbytes for p in pieces), files, memory))
    objects, resolve = object_items({COMMON: common}, _objects(source, common["args"]))
    items = [[piece.write_item() for piece in file] for file in dealt]
    plans, metadata = plan_files(staged, [*items, objects])
    tasks = [
        Task(
            f"file-{number:05d}",
            sum(piece.nbytes for piece in file),
            _FileJob(source.path, staged, plan),
        )
        for number, (file, plan) in enumerate(zip(dealt, plans, strict=False))
    ]

    def finish_files(written: list[Any]) -> None:
        finish(staged, metadata, [*written, write_file(staged, plans[-1], resolve)])

    fingerprint = str([[str(piece) for piece in file] for file in dealt] + [str(common["args"])])
    return _Planned(tasks, _write_file, finish_files, fingerprint, settle=partial(keep, staged))


def _file_count(total: int, files: int | None, memory: int) -> int:
    least = math.ceil(total / (memory // FILE_SHARE))
    if files is not None and files < least:
        raise UsageError(
            f"--files {files}: a file is held in memory while it is written; use {least} or more, "
            "more --memory-gb or fewer --workers"
        )
    return files or least


def _deal_out(pieces: Sequence[TensorSlice], files: int) -> list[list[TensorSlice]]:
    """Runs of pieces of about the same size; fewer than `files` where pieces are few."""
    total, before = sum(piece.nbytes for piece in pieces), 0
    dealt: list[list[TensorSlice]] = [[] for _ in range(files)]
    for piece in pieces:
        dealt[before * files // total].append(piece)
        before += piece.nbytes
    return [file for file in dealt if file]


def _common(source: TorchDistCheckpoint, layout: Layout | None, optimizer: bool) -> dict[str, Any]:
    """The common state, with what Megatron goes by when it looks for the rest.

    It looks for no random states and no optimizer's where the arguments say that none was saved.
    """
    common, args = dict(source.common), copy.copy(source.args)
    if layout is not None:
        args = with_layout(args, args_of_layout(args, layout))
    if RNG in _of_other_ranks(source.args, args):
        args.no_save_rng = True
    if RERUN in _of_other_ranks(source.args, args):
        common.pop("rerun_state_machine", None)
    if not optimizer:
        args.no_save_optim = True
        common.pop("optimizer", None)
    return {**common, "args": args}


def _objects(source: TorchDistCheckpoint, args: Namespace) -> dict[str, bytes]:
    """All other objects, as they are stored, but for those of ranks that are gone."""
    dropped = _of_other_ranks(source.args, args)
    kept = [key for key in source.object_keys() if not key.startswith((COMMON, *dropped))]
    for key in kept:
        source.object(key)  # it has to be data
    return {key: source.object_bytes(key) for key in kept}


def _of_other_ranks(saved: Namespace, args: Namespace) -> list[str]:
    """Prefixes of objects that no rank of a layout can take.

    Random states are of a tensor- and pipeline-parallel rank, those of the rerun machine of a rank.
    """
    model = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    if _differs(saved, args, *model):
        return [RNG, RERUN]
    return [RERUN] if _differs(saved, args, "world_size", "data_parallel_size") else []


def _differs(one: Namespace, other: Namespace, *names: str) -> bool:
    return any(getattr(one, name) != getattr(other, name) for name in names)


def _plan_rank_files(
    source: TorchDistCheckpoint, staged: Path, layout: Layout, steps: int | None
) -> _Planned:
    from megatron_trinity.checkpoint.rank_files.optimizer import of_one_rank

    args = args_of_layout(source.args, layout)
    stored_args = of_one_rank(with_layout(source.args, args))
    stored_args.padded_vocab_size = args.padded_vocab_size
    stored_args.transformer_impl = args.transformer_impl
    dropped = ("args", "content_metadata", "optimizer", "rerun_state_machine")
    saved = {key: value for key, value in source.common.items() if key not in dropped}
    saved["args"] = stored_args
    tasks = [
        Task(f"file-{number:05d}", nbytes, job)
        for number, (job, nbytes) in enumerate(rank_jobs(source, args, saved, staged, steps))
    ]

    def finish_files(written: list[Any]) -> None:
        write_manifest(staged, dict(written))

    return _Planned(tasks, write_rank_file, finish_files, str(stored_args), prepare=adapt_megatron)


def _write_file(job: _FileJob, report: Report) -> list[WriteResult]:
    source = tensors_of(job.source)

    def resolve(item: WriteItem) -> Tensor:
        assert item.tensor_data is not None
        chunk = item.tensor_data.chunk
        assert chunk is not None
        row, rows = _rows(chunk.offsets, chunk.sizes, item.tensor_data.size)
        values = source.rows(item.index.fqn, row, rows).reshape(chunk.sizes)
        report(values.nbytes)
        return values

    return write_file(job.directory, job.plan, resolve)


def _rows(offsets: Sequence[int], sizes: Sequence[int], shape: torch.Size) -> tuple[int, int]:
    """First row and number of rows of a slice's box, counted over all axes but the last."""
    row = 0
    for offset, size in zip(offsets[:-1], shape[:-1], strict=True):
        row = row * size + offset
    return row, math.prod(sizes[:-1])
