#!/usr/bin/env python3
"""Write a Megatron checkpoint, for any layout, from an AfMoE directory of Hugging Face."""

import argparse
import os
from pathlib import Path

from megatron_trinity.checkpoint.conversion.tasks import add_resource_arguments, memory_and_workers
from megatron_trinity.errors import UsageError, run_command

EXAMPLE = """example:
  python tools/import_hf.py --hf models/trinity-nano --save runs/nano
then go on from its weights with
  torchrun ... pretrain_trinity.py --preset nano --load runs/nano --finetune --save runs/mine ...
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", type=Path, required=True, help="directory to read")
    parser.add_argument("--save", type=Path, help="directory of checkpoints to write into")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], help="dtype of matrices (default: as they are)"
    )
    add_resource_arguments(parser)
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="take values that are not finite"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check what is there, of an index alone the names, and write nothing",
    )
    arguments = parser.parse_args()
    if arguments.save is None and not arguments.dry_run:
        raise UsageError("--save DIR is needed, or --dry-run")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing here is for a GPU

    from megatron_trinity.checkpoint.conversion.rows import row_count
    from megatron_trinity.checkpoint.hf.source import open_hf_directory

    memory, workers = memory_and_workers(arguments.memory_gb, arguments.workers)
    if arguments.dry_run:
        found = open_hf_directory(arguments.hf, names_suffice=True)
        sources = sum(len(entry.hf) for entry in found.table)
        values = sum(row_count(entry.shape) * entry.shape[-1] for entry in found.table)
        checked = "names and shapes" if found.tensors else "names (there are no weights)"
        print(
            f"{arguments.hf}: {checked} are right: {sources:,} tensors become "
            f"{len(found.table):,}, {values / 1e9:,.2f} B values"
        )
        return

    from megatron_trinity.checkpoint.conversion.allocator import return_freed_memory
    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()
    return_freed_memory()

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
    for name, count in done.nonfinite.items():
        print(f"warning: {name} has {count} values that are not finite")
    print(f"wrote {arguments.save}: {done.written / 1e6:,.1f} MB of weights")


if __name__ == "__main__":
    run_command(main)
