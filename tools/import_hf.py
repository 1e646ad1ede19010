#!/usr/bin/env python3
"""Write a Megatron checkpoint, for any layout, from an AfMoE directory of Hugging Face."""

from pathlib import Path

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

EXAMPLE = """example:
  python tools/import_hf.py --hf models/trinity-nano --save runs/nano
then go on from its weights with
  torchrun ... pretrain_trinity.py --preset nano --load runs/nano --finetune --save runs/mine ...
"""


def main() -> None:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--hf", type=Path, required=True, help="directory to read")
    parser.add_argument("--save", type=Path, help="directory of checkpoints to write into")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], help="dtype of matrices (default: as they are)"
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
    if arguments.dry_run:
        check(arguments.hf)
        return
    start_conversion()

    from megatron_trinity.checkpoint.hf.import_hf import import_hf
    from megatron_trinity.progress import progress_for_terminal

    done = import_hf(
        arguments.hf,
        arguments.save,
        dtype=arguments.dtype,
        memory_bytes=memory,
        workers=workers,
        allow_nonfinite=arguments.allow_nonfinite,
        overwrite=arguments.overwrite,
        show=progress_for_terminal,
    )
    print_written(arguments.save, done.written, done.nonfinite)


def check(directory: Path) -> None:
    hide_gpus()  # nothing here is for one

    from megatron_trinity.checkpoint.conversion.rows import row_count
    from megatron_trinity.checkpoint.hf.source import open_hf_directory

    found = open_hf_directory(directory, names_suffice=True)
    sources = sum(len(entry.hf) for entry in found.table)
    values = sum(row_count(entry.shape) * entry.shape[-1] for entry in found.table)
    checked = "names and shapes" if found.tensors else "names (there are no weights)"
    print(
        f"{directory}: {checked} are right: {sources:,} tensors become {len(found.table):,}, "
        f"{values / 1e9:,.2f} B values"
    )


if __name__ == "__main__":
    run_command(main)
