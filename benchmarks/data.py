"""How fast are samples made, against Megatron's GPT dataset, and what does a start cost?

Time and memory up to the first sample of 10 million documents. Then tokens a second of one core
behind torch's loader without workers, from one source and from a blend of four, with and without
documents kept apart; alternating in one process, from files in the page cache and after they were
dropped from it.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from megatron_trinity.command_line.parser import (
    command_parser,
    require_at_least_one,
    require_parent,
)
from megatron_trinity.command_line.peak_memory import peak_memory
from megatron_trinity.command_line.rows import Row, add_json_argument, make_row, write_rows
from megatron_trinity.errors import run_command
from megatron_trinity.upstream import adapt_megatron

EXAMPLE = """example:
  OMP_NUM_THREADS=1 python benchmarks/data.py
"""
SEQ_LENGTH = 4096
BATCH = 4
VOCABULARY = 8192
MEAN_TOKENS = 700  # of a document; lengths are lognormal
WEIGHTS = (0.4, 0.3, 0.2, 0.1)
MIB = 2**20

Dataset = Any


def write_indexed(prefix: Path, documents: int, seed: int, mean: float, sparse: bool) -> None:
    """An indexed dataset of random tokens, or of zeros in a file that takes no room."""
    from megatron_trinity.data.indexed import HEADER, MAGIC, VERSION

    generator = np.random.default_rng(seed)
    lengths = generator.lognormal(np.log(mean) - 0.5, 1.0, documents).astype(np.int32) + 1
    ends = np.cumsum(lengths, dtype=np.int64)
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1))
        stream.write(lengths.tobytes())
        stream.write(((ends - lengths) * 2).tobytes())
        stream.write(np.arange(documents + 1, dtype=np.int64).tobytes())
    with open(f"{prefix}.bin", "wb") as stream:
        if sparse:
            stream.truncate(int(ends[-1]) * 2)
        else:
            tokens = generator.integers(0, VOCABULARY, int(ends[-1]), dtype=np.uint16)
            stream.write(tokens.tobytes())


def ours(prefixes: Sequence[Path], weights: Sequence[float], masking: bool) -> Dataset:
    """The dataset that a run trains on."""
    from megatron_trinity.data.corpus import Part
    from megatron_trinity.data.datasets import TrainingDataset
    from megatron_trinity.data.description import Description, PlannedPhase, Source
    from megatron_trinity.data.plan import Plan
    from megatron_trinity.data.samples import SampleFormat

    sources = tuple(Source(path.name, (Part(str(path)),)) for path in prefixes)
    blend = {path.name: weight for path, weight in zip(prefixes, weights, strict=True)}
    plan = Plan(Description(sources, (PlannedPhase(weights=blend),)), SEQ_LENGTH, 1)
    return TrainingDataset(plan, SampleFormat(SEQ_LENGTH, VOCABULARY, masking))


def megatrons(
    prefixes: Sequence[Path], weights: Sequence[float], masking: bool, samples: int, cache: Path
) -> Dataset:
    """Megatron's, for a run of `samples`."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ_LENGTH,
        blend_per_split=[([str(path) for path in prefixes], list(weights)), None, None],
        path_to_cache=str(cache),
        tokenizer=SimpleNamespace(
            eod=1, pad=-1, vocab_size=VOCABULARY, unique_identifiers={"class": "benchmark"}
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        inter_document_masking=masking,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, [samples, None, None], lambda: True, config
    ).build()
    return train


def tokens_per_second(dataset: Dataset, samples: range) -> float:
    """Of the samples in order, in batches, behind the loader that training has."""
    batches = [list(samples[n : n + BATCH]) for n in range(0, len(samples), BATCH)]
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=0)
    began = time.perf_counter()
    for _ in loader:
        pass
    return len(samples) * SEQ_LENGTH / (time.perf_counter() - began)


def drop_from_cache(prefixes: Sequence[Path]) -> None:
    """Let the next read of the files go to the disk, where the system allows it."""
    for path in (Path(f"{prefix}{end}") for prefix in prefixes for end in (".bin", ".idx")):
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(folder: Path, documents: int, samples: int, repeats: int) -> Iterator[Row]:
    """Speed of both, case by case."""
    prefixes = [folder / f"source{number}" for number in range(len(WEIGHTS))]
    for number, prefix in enumerate(prefixes):
        write_indexed(prefix, documents, number, MEAN_TOKENS, sparse=False)
    for name, count in (("one source", 1), (f"blend of {len(WEIGHTS)}", len(WEIGHTS))):
        for masking in (False, True):
            given = (prefixes[:count], WEIGHTS[:count], masking)
            both = (ours(*given), megatrons(*given, samples * (repeats + 1), folder / "cache"))
            for cold in (False, True):
                speeds: list[tuple[float, float]] = []
                for repeat in range(repeats):
                    part = range(repeat * samples, (repeat + 1) * samples)
                    pair = []
                    for dataset in both:
                        if cold:
                            drop_from_cache(prefixes)
                        pair.append(tokens_per_second(dataset, part))
                    speeds.append((pair[0], pair[1]))
                mine, its = (statistics.median(side) for side in zip(*speeds, strict=True))
                case = f"{name}{', documents apart' if masking else ''}, "
                case += "cold" if cold else "warm"
                yield make_row(case, mine / 1e6, its / 1e6, "M tokens/s", more_is_better=True)


def start_up(folder: Path, documents: int) -> Iterator[Row]:
    """Seconds and memory up to the first sample of many documents."""
    from megatron_trinity.data.indexed import check_indexed_dataset

    prefix = folder / "many"
    write_indexed(prefix, documents, 9, 100, sparse=True)
    samples = 1000

    def our_start() -> object:
        check_indexed_dataset(prefix)
        return ours([prefix], [1.0], False)[0]

    def its_start() -> object:
        return megatrons([prefix], [1.0], False, samples, folder / f"cache {time.time_ns()}")[0]

    seconds, memory = [], []
    for start in (our_start, its_start):
        drop_from_cache([prefix])
        memory.append(peak_memory(lambda start=start: start) / MIB)  # type: ignore[misc]
        drop_from_cache([prefix])
        seconds.append(_seconds(start))
    name = f"{documents / 1e6:g} million documents"
    yield make_row(f"start, {name}, cold", seconds[0], seconds[1], "s")
    yield make_row(f"memory, {name}", memory[0], memory[1], "MiB")


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def show(rows: Sequence[Row]) -> None:
    """The rows as a table."""
    table = Table("case", "ours", "GPTDataset", "unit", "ratio")
    for row in rows:
        peer = "" if row["peer"] is None else f"{row['peer']:.3g}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        table.add_row(row["case"], f"{row['ours']:.3g}", peer, row["unit"], ratio)
    Console(width=100).print(table)


def main() -> None:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--repeats", type=int, default=5, help="of each case (default: 5)")
    parser.add_argument("--quick", action="store_true", help="smaller, within a minute")
    add_json_argument(parser)
    options = parser.parse_args()
    require_at_least_one("--repeats", options.repeats)
    require_parent("--json", options.json)
    adapt_megatron()  # without a process group: forks measure memory
    repeats, samples = (2, 400) if options.quick else (options.repeats, 2000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = list(start_up(folder, 10**6 if options.quick else 10**7))
        rows += compare(folder, 4_000 if options.quick else 20_000, samples, repeats)
    show(rows)
    write_rows(options.json, rows)


if __name__ == "__main__":
    run_command(main)
