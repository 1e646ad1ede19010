"""The process that writes a file of a checkpoint computes its checksum.

A file's sum goes with the results of writing it, from every writer, in the background or not, to
the rank that writes `.metadata`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.storage import WriteResult

from megatron_trinity.file_sums import FileSum, file_sum
from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="checkpoint-sums",
    symbols=(
        "megatron.core.dist_checkpointing.strategies.filesystem_async"
        ".FileSystemWriterAsync.write_preloaded_data",
        "megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync.finish",
    ),
    reason=(
        "Megatron's own checksums (`--verify-integrity`) are computed by rank 0 alone, which "
        "reads the whole checkpoint while all ranks wait"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="megatron-core's writers return checksums of what they have written",
)


_sums: dict[Path, dict[str, FileSum]] = {}
"""Directory to the sums of its files, from when `.metadata` is written until they are asked for."""


@dataclass(frozen=True)
class SummedResult(WriteResult):
    """The result of one item, which also has the sum of the file that the item is in."""

    file_sum: FileSum


def summed(results: list[WriteResult], directory: Path) -> list[WriteResult]:
    """The results of one file's items, the first of them with the sum of the file.

    Raises:
        OSError: the file cannot be read.
    """
    if not results:
        return results
    content = {field.name: getattr(results[0], field.name) for field in fields(WriteResult)}
    found = file_sum(directory / results[0].storage_data.relative_path)
    return [SummedResult(**content, file_sum=found), *results[1:]]


def sums_of(files: Iterable[Iterable[WriteResult]]) -> dict[str, FileSum]:
    """Name to sum of the files whose results have one."""
    return {
        result.storage_data.relative_path: result.file_sum
        for results in files
        for result in results
        if isinstance(result, SummedResult)
    }


def take_sums(directory: Path) -> dict[str, FileSum]:
    """Sums of files that were written into a checkpoint, by name; on the rank of `.metadata`."""
    return _sums.pop(directory, {})


def install() -> None:
    """Wrap where files are written, and where rank 0 has the results of all of them."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    write, finish = FileSystemWriterAsync.write_preloaded_data, FileSystemWriterAsync.finish

    @functools.wraps(write)
    def write_and_sum(
        transforms: Any,
        local_proc_idx: int,
        write_bucket: Any,
        results_queue: Any,
        count_queue: Any,
        use_fsync: bool,
        **kwargs: Any,
    ) -> Any:
        # Without the queues, so that what is put there is the result with the sum.
        output = write(transforms, local_proc_idx, write_bucket, None, None, use_fsync, **kwargs)
        if isinstance(output[1], list):
            output = (output[0], _summed_or_error(output[1], Path(write_bucket[0]).parent))
        if results_queue is not None:
            results_queue.put(output)
        if count_queue is not None:
            count_queue.get()
            count_queue.task_done()
        return output

    @functools.wraps(finish)
    def finish_and_keep(self: Any, metadata: Any, results: list[list[WriteResult]]) -> None:
        finish(self, metadata, results)
        _sums[Path(self.checkpoint_dir)] = sums_of(results)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write_and_sum)
    FileSystemWriterAsync.finish = finish_and_keep


def _summed_or_error(results: list[WriteResult], directory: Path) -> list[WriteResult] | OSError:
    try:
        return summed(results, directory)
    except OSError as error:
        return error
