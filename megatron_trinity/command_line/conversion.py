"""What the tools that read and write checkpoints slice by slice have in common."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from megatron_trinity.errors import UsageError

GIB = 2**30


def hide_gpus() -> None:
    """Keep this process and its children off GPUs; before torch looks for them."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def start_conversion() -> None:
    """Make this process ready to read and write checkpoints, before it imports what does so."""
    hide_gpus()  # nothing here is for one

    from megatron_trinity.checkpoint.conversion.allocator import return_freed_memory
    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()
    return_freed_memory()


def add_memory_argument(parser: argparse.ArgumentParser, shared: str = "") -> None:
    """Add `--memory-gb`, in GiB; `shared` says in the help who shares it."""
    parser.add_argument(
        "--memory-gb",
        type=float,
        default=2.0,
        help=f"memory for values, in GiB{shared} (default: %(default)s)",
    )


def add_resource_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `memory_and_workers` takes."""
    add_memory_argument(parser, ", of all processes together")
    parser.add_argument("--workers", type=int, help="processes (default: one a CPU, 4 at most)")


def memory_bytes(memory_gib: float) -> int:
    """Bytes that `--memory-gb` asks for.

    Raises:
        UsageError: it is not positive.
    """
    if memory_gib <= 0:
        raise UsageError(f"--memory-gb {memory_gib} has to be positive")
    return int(memory_gib * GIB)


def memory_and_workers(memory_gib: float, workers: int | None) -> tuple[int, int]:
    """Bytes and processes that a command line asks for; by default a process a CPU, 4 at most.

    Raises:
        UsageError: one of them is not positive.
    """
    workers = min(4, len(os.sched_getaffinity(0))) if workers is None else workers
    if memory_gib <= 0 or workers < 1:
        raise UsageError(f"--memory-gb {memory_gib} and --workers {workers} have to be positive")
    return int(memory_gib * GIB), workers


def add_nonfinite_argument(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add `--allow-nonfinite`; `verb` says in the help what is done with such values."""
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help=f"{verb} values that are not finite"
    )


def print_written(
    target: Path,
    nbytes: int,
    nonfinite: Mapping[str, int],
    why: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Say how many bytes of weights were written, and warn of values that are not finite.

    Args:
        nonfinite: name of a tensor to how many of its values are not finite, if any.
        why: name of a tensor to what is known of the reason.
    """
    for name, count in nonfinite.items():
        reason = f", {why[name]}" if name in why else ""
        print(f"warning: {name} has {count} values that are not finite{reason}")
    print(f"wrote {target}: {nbytes / 1e6:,.1f} MB of weights")
