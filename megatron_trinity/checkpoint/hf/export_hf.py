"""A Megatron checkpoint as an AfMoE directory of Hugging Face."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_trinity.checkpoint.conversion.rows import Piece, Shape, row_count
from megatron_trinity.checkpoint.conversion.slices import overlaps, slices
from megatron_trinity.checkpoint.conversion.staging import resumable_staging
from megatron_trinity.checkpoint.conversion.tasks import Task, run_tasks
from megatron_trinity.checkpoint.fp8.bands import Band, Quantized, bands
from megatron_trinity.checkpoint.fp8.forms import (
    Form,
    FormName,
    form,
    is_quantized,
    quantization_config,
    refuse_partial_blocks,
)
from megatron_trinity.checkpoint.fp8.quantize import E4M3
from megatron_trinity.checkpoint.hf.config import hf_config_from_args
from megatron_trinity.checkpoint.hf.export_parts import (
    PartJob,
    Read,
    Target,
    WrittenPart,
    begin_file,
    parts,
    write_part,
)
from megatron_trinity.checkpoint.hf.files import write_configs, write_json
from megatron_trinity.checkpoint.hf.mapping import (
    Entry,
    Experts,
    check_shape,
    entries,
    prove_bijection,
    refuse_left_over,
)
from megatron_trinity.checkpoint.hf.safetensors_files import FileLayout, lay_out, read_header
from megatron_trinity.checkpoint.hf.source import INDEX, SINGLE
from megatron_trinity.checkpoint.torch_dist.read import TorchDistCheckpoint, TorchDistTensors
from megatron_trinity.data.manifest import refuse_existing
from megatron_trinity.errors import UsageError
from megatron_trinity.progress import Progress, SilentProgress
from megatron_trinity.upstream.checkpoint_tracker import sync

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLICE_SHARE = 8
"""A process's memory has room for so many slices: what is read, converted and checked of one."""


@dataclass(frozen=True)
class Exported:
    """What an export did.

    Attributes:
        written: bytes of tensors.
        nonfinite: name of a Hugging Face tensor to its values that are not finite, if any.
        fp8_errors: name of each matrix in FP8 to the Frobenius norm of its rounding, relative to
            that of the matrix.
    """

    written: int
    nonfinite: dict[str, int]
    fp8_errors: dict[str, float]


Shard = dict[str, tuple[torch.dtype, Shape]]
"""What is in a safetensors file: the type and shape of each tensor, by name."""


def export_hf(
    load: Path,
    hf: Path,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    experts: Experts = "per-expert",
    shard_bytes: int = 5 * 10**9,
    memory_bytes: int = 2 * 2**30,
    workers: int = 1,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    fp8: FormName | None = None,
    show: Callable[[int | None], Progress] = SilentProgress,
) -> Exported:
    """Write the directory `hf` from the checkpoint `load`; it appears whole or not at all.

    Args:
        load: checkpoint directory of any layout.
        hf: directory to write.
        dtype: `fp32` or `bf16`, by default the one that the run trained in. Norm gains and expert
            biases are always fp32.
        tokenizer: directory to take the tokenizer from, by default the one that the run used.
        experts: their form, three matrices each or stacks.
        shard_bytes: size at which a new safetensors file is begun.
        memory_bytes: for values in all processes together.
        workers: processes, each of them at another file.
        allow_nonfinite: write values that are not finite.
        overwrite: replace what is there.
        fp8: form of FP8 for the matrices of attention, MLPs and experts, if any.
        show: makes the progress display, given the bytes in all.

    Raises:
        UsageError: FP8 is asked for with stacks of experts, or with values that are not finite.
        TrinityError: a tensor is missing, left over or not finite, a path is not usable, or
            matrices are not whole blocks for FP8.
    """
    if fp8 and experts != "per-expert":
        raise UsageError("FP8 is read with three matrices an expert: --experts per-expert")
    if fp8 and allow_nonfinite:
        raise UsageError(
            "FP8 has no scale for what is not finite: leave out --allow-nonfinite or --fp8"
        )
    checkpoint = TorchDistCheckpoint(load)
    args = checkpoint.args
    if not overwrite:
        refuse_existing([hf], "is not replaced")
    torch_dtype = DTYPES[dtype or ("bf16" if args.bf16 else "fp32")]
    tokenizer_dir = tokenizer or (Path(args.tokenizer_model) if args.tokenizer_model else None)
    table = tuple(entries(hf_config_from_args(args), experts))
    prove_bijection(table)
    _check_tensors(checkpoint, table)
    fp8_form = form(fp8, torch_dtype) if fp8 else None
    quantized = [entry for entry in table if fp8_form and is_quantized(entry)]
    plain = [entry for entry in table if not (fp8_form and is_quantized(entry))]
    if fp8_form:
        refuse_partial_blocks(fp8_form, quantized)
    shards = list(_shards(table, torch_dtype, shard_bytes, fp8_form))
    files = {_file_name(n, len(shards)): shard for n, shard in enumerate(shards)}
    sizes = {file: sum(_nbytes(*said) for said in shard.values()) for file, shard in files.items()}
    needed = sum(sizes.values())
    modified = (checkpoint.path / ".metadata").stat().st_mtime_ns
    with resumable_staging(hf, [str(checkpoint.path), modified, str(files)], needed) as staging:
        whole = staging / hf.name
        whole.mkdir(exist_ok=True)
        quantization = quantization_config(fp8_form, table) if fp8_form else None
        dtype_name = str(torch_dtype).removeprefix("torch.")
        write_configs(args, dtype_name, whole, tokenizer_dir, quantization)
        layouts = {
            file: lay_out((name, *said) for name, said in shard.items())
            for file, shard in files.items()
        }
        slice_bytes = memory_bytes // workers // SLICE_SHARE
        reads = _reads(checkpoint, plain, files, layouts, slice_bytes)
        banded = _bands(fp8_form, quantized, layouts, slice_bytes) if fp8_form else {}
        tasks = []
        for file, layout in layouts.items():
            begin_file(whole / file, layout)
            for number, items in enumerate(parts((*reads[file], *banded.get(file, ())))):
                job = PartJob(checkpoint.path, whole / file, items, allow_nonfinite)
                tasks.append(Task(f"{file}.{number:05d}", job.nbytes, job))
        written: list[WrittenPart] = run_tasks(
            write_part, tasks, staging, workers, show(needed), settle=lambda done: sync(done.file)
        )
        for file, layout in layouts.items():
            if read_header(whole / file).keys() != layout.offsets.keys():
                raise OSError(f"{whole / file} was not written whole")
        if len(files) > 1:
            weight_map = {name: file for file, shard in files.items() for name in shard}
            index = {"metadata": {"total_size": needed}, "weight_map": weight_map}
            write_json(whole / INDEX, index)
        if hf.exists():
            hf.rename(staging / "replaced")
        whole.rename(hf)
    nonfinite: Counter[str] = Counter()
    matrices: dict[str, Quantized] = defaultdict(Quantized)
    for part in written:
        nonfinite += part.nonfinite
        for name, done in part.matrices.items():
            matrices[name] += done
    errors = {name: matrix.relative_error for name, matrix in matrices.items()}
    return Exported(needed, dict(nonfinite), errors)


def _nbytes(dtype: torch.dtype, shape: Shape) -> int:
    return row_count(shape) * shape[-1] * dtype.itemsize


def _check_tensors(checkpoint: TorchDistTensors, table: Sequence[Entry]) -> None:
    left = set(checkpoint.model_keys())
    for entry in table:
        found = checkpoint.shape(entry.trinity)
        at_least = entry.shape[0]  # rows of the vocabulary are padded, to any number
        check_shape(entry.trinity, found, entry.padded(max(found[0], at_least)))
        left.discard(entry.trinity)
    refuse_left_over(left)


def _shards(
    table: Sequence[Entry], dtype: torch.dtype, shard_bytes: int, fp8_form: Form | None
) -> Iterator[Shard]:
    """Hugging Face tensors in the order of the table, file by file; scales with their matrix."""
    shard: Shard = {}
    size = 0
    for entry in table:
        for name, shape in entry.hf.items():
            stored: Shard
            if fp8_form and is_quantized(entry):
                scale = (fp8_form.scale_dtype, fp8_form.scale_shape(shape))
                stored = {name: (E4M3, shape), fp8_form.scale_name(name): scale}
            else:
                stored = {name: (torch.float32 if len(shape) == 1 else dtype, shape)}
            more = sum(_nbytes(*said) for said in stored.values())
            if shard and size + more > shard_bytes:
                yield shard
                shard, size = {}, 0
            shard |= stored
            size += more
    yield shard


def _file_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _reads(
    checkpoint: TorchDistTensors,
    table: Sequence[Entry],
    files: dict[str, Shard],
    layouts: dict[str, FileLayout],
    max_bytes: int,
) -> dict[str, list[Read]]:
    """What to read for each file."""
    plan: dict[str, list[Read]] = defaultdict(list)
    file_of = {name: file for file, shard in files.items() for name in shard}
    for entry in table:
        itemsize = max(checkpoint.dtype(entry.trinity).itemsize, torch.float32.itemsize)
        for part in slices(entry.shape, itemsize, max_bytes):
            targets: dict[str, list[Target]] = {}
            for piece in overlaps(entry.pieces, part):
                file = file_of[piece.hf]
                dtype, shape = files[file][piece.hf]
                offset = layouts[file].offsets[piece.hf] + _nbytes(dtype, (piece.hf_row, shape[-1]))
                nbytes = _nbytes(dtype, (piece.rows, shape[-1]))
                target = Target(piece.hf, dtype, offset, piece.row, piece.rows, nbytes)
                targets.setdefault(file, []).append(target)
            for file, found in targets.items():
                plan[file].append(Read(entry.trinity, part, tuple(found)))
    return plan


def _bands(
    fp8_form: Form, quantized: Sequence[Entry], layouts: dict[str, FileLayout], max_bytes: int
) -> dict[str, list[Band]]:
    """The bands that each file is made of."""
    file_of = {name: file for file, layout in layouts.items() for name in layout.offsets}
    plan: dict[str, list[Band]] = defaultdict(list)
    for entry in quantized:
        pieces: dict[str, list[Piece]] = defaultdict(list)
        for piece in entry.pieces:
            pieces[piece.hf].append(piece)
        for name, of_matrix in pieces.items():
            file = file_of[name]
            plan[file].extend(bands(fp8_form, entry, name, of_matrix, layouts[file], max_bytes))
    return plan
