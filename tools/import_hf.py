#!/usr/bin/env python3
"""Write a Megatron checkpoint, for any layout, from an AfMoE model of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_trinity.command_line.conversion import (
    add_nonfinite_argument,
    add_resource_arguments,
    hide_gpus,
    memory_and_workers,
    print_written,
    start_conversion,
)
from megatron_trinity.command_line.parser import command_parser
from megatron_trinity.errors import UsageError, run_command

if TYPE_CHECKING:
    from megatron_trinity.checkpoint.hf.import_hf import Imported

EXAMPLE = """example:
  python tools/import_hf.py --hf models/trinity-nano --save runs/nano
or, from the Hub's cache or the Hub,
  python tools/import_hf.py --hf arcee-ai/Trinity-Nano-Base --save runs/nano
then go on from its weights with
  torchrun ... pretrain_trinity.py --preset nano --load runs/nano --finetune --save runs/mine ...
"""


def main() -> None:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--hf", required=True, help="directory to read, or OWNER/NAME of a model of the Hub"
    )
    parser.add_argument(
        "--revision", help="branch, tag or commit of a model of the Hub (default: its main branch)"
    )
    parser.add_argument("--save", type=Path, help="directory of checkpoints to write into")
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16"],
        help="dtype of matrices (default: as they are, fp16 as fp32)",
    )
    add_resource_arguments(parser)
    add_nonfinite_argument(parser, "take")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check what is there, of an index alone the names, and write nothing",
    )
    arguments = parser.parse_args()
    if arguments.save is None and not arguments.dry_run:
        raise UsageError("--save DIR is needed, or --dry-run")
    memory, workers = memory_and_workers(arguments.memory_gb, arguments.workers)
    hide_gpus()  # nothing here is for one

    from megatron_trinity.checkpoint.hf.hub import find_model

    model = find_model(arguments.hf, arguments.revision, download=not arguments.dry_run)
    if model.revision is not None:
        print(f"{arguments.hf}: revision {model.revision}, {model.path}", flush=True)
    if arguments.dry_run:
        check(arguments.hf, model.path)
        return
    start_conversion()

    from megatron_trinity.checkpoint.hf.import_hf import import_hf
    from megatron_trinity.progress import progress_for_terminal

    done = import_hf(
        model.path,
        arguments.save,
        dtype=arguments.dtype,
        memory_bytes=memory,
        workers=workers,
        allow_nonfinite=arguments.allow_nonfinite,
        overwrite=arguments.overwrite,
        show=progress_for_terminal,
    )
    if done.source != done.matrices:
        print(conversion_line(done))
    why = {
        name: f"{n} of them too large for {arguments.dtype}" for name, n in done.overflowed.items()
    }
    print_written(arguments.save, done.written, done.nonfinite, why)


def check(name: str, directory: Path) -> None:
    """Say whether a directory, of the model called `name`, has all that an import needs."""
    from megatron_trinity.checkpoint.conversion.rows import row_count
    from megatron_trinity.checkpoint.hf.source import open_hf_directory

    found = open_hf_directory(directory, names_suffice=True)
    sources = sum(len(entry.hf) for entry in found.table)
    values = sum(row_count(entry.shape) * entry.shape[-1] for entry in found.table)
    checked = "names and shapes" if found.tensors else "names (there are no weights)"
    print(
        f"{name}: {checked} are right: {sources:,} tensors become {len(found.table):,}, "
        f"{values / 1e9:,.2f} B values"
    )


def conversion_line(done: Imported) -> str:
    """What converting the matrices has changed."""
    kinds = [str(dtype).removeprefix("torch.") for dtype in (done.source, done.matrices)]
    changes = [
        f"{count:,} values {how} in {len(found):,} tensors"
        for how, found in (("rounded", done.rounded), ("overflowed", done.overflowed))
        if (count := found.total())
    ]
    return f"{kinds[0]} became {kinds[1]}: {', '.join(changes) or 'every value as it was'}"


if __name__ == "__main__":
    run_command(main)
