"""How fast are samples made, against Megatron's GPT dataset, and what does a start cost?

Time and memory up to the first sample of 10 million documents. Then tokens a second of one core
behind torch's loader without workers, from one source and from a blend of four, with and without
documents kept apart, and of each packing; alternating in one process, in CPU time from files in the
page cache, and by the clock after they were dropped from it. Where NVIDIA DALI is installed, its
loader against torch's. Last, what a loader gives against 20 times the tokens that training of the
tiny preset takes, in CPU time.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
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
from megatron_trinity.command_line.sides import random_batches, trainers
from megatron_trinity.command_line.single_rank import single_rank_environment
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


def ours(
    prefixes: Sequence[Path],
    weights: Sequence[float],
    masking: bool,
    packing: str = "sequential",
    length: int = SEQ_LENGTH,
) -> Dataset:
    """The dataset that a run trains on."""
    from megatron_trinity.data.corpus import Part
    from megatron_trinity.data.datasets import TrainingDataset
    from megatron_trinity.data.description import Description, PlannedPhase, Source
    from megatron_trinity.data.plan import Plan
    from megatron_trinity.data.samples import SampleFormat

    sources = tuple(Source(path.name, (Part(str(path)),)) for path in prefixes)
    blend = {path.name: weight for path, weight in zip(prefixes, weights, strict=True)}
    phase = PlannedPhase(weights=blend, packing=packing)
    plan = Plan(Description(sources, (phase,)), length, 1)
    return TrainingDataset(plan, SampleFormat(length, VOCABULARY, masking))


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


def loader(dataset: Dataset, samples: range) -> Iterable[Any]:
    """The loader that training has, without workers: batches of the samples in order."""
    batches = [list(samples[n : n + BATCH]) for n in range(0, len(samples), BATCH)]
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=0)


def through_dali(dataset: Dataset, samples: range) -> Iterator[Any]:
    """The same batches through NVIDIA DALI."""
    from megatron_trinity.data.dali import DaliLoader

    return islice(DaliLoader(dataset, samples.start, BATCH, 0, 1), len(samples) // BATCH)


def tokens_per_second(
    batches: Iterable[Any], clock: Callable[[], float] = time.process_time
) -> float:
    """By default for each second that the threads of this process have worked."""
    began, tokens = clock(), 0
    for batch in batches:
        tokens += batch["tokens"].numel()
    return tokens / (clock() - began)


def drop_from_cache(prefixes: Sequence[Path]) -> None:
    """Let the next read of the files go to the disk, where the system allows it."""
    for path in (Path(f"{prefix}{end}") for prefix in prefixes for end in (".bin", ".idx")):
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_sources(folder: Path, documents: int) -> list[Path]:
    """One for each of the weights."""
    prefixes = [folder / f"source{number}" for number in range(len(WEIGHTS))]
    for number, prefix in enumerate(prefixes):
        write_indexed(prefix, documents, number, MEAN_TOKENS, sparse=False)
    return prefixes


Side = Callable[[range], float]
"""Samples to the tokens of them that were made in a second."""


def alternate(case: str, sides: Sequence[Side], samples: int, repeats: int) -> Row:
    """Medians of both sides, which make the same samples in turn."""
    speeds = []
    for repeat in range(repeats):
        part = range(repeat * samples, (repeat + 1) * samples)
        speeds.append([side(part) / 1e6 for side in sides])
    mine, its = (statistics.median(side) for side in zip(*speeds, strict=True))
    return make_row(case, mine, its, "M tokens/s", more_is_better=True)


def warm(dataset: Dataset, make: Callable[..., Iterable[Any]] = loader) -> Side:
    return lambda part: tokens_per_second(make(dataset, part))


def cold(dataset: Dataset, prefixes: Sequence[Path]) -> Side:
    def side(part: range) -> float:
        drop_from_cache(prefixes)
        return tokens_per_second(loader(dataset, part), time.perf_counter)

    return side


def compare(folder: Path, prefixes: Sequence[Path], samples: int, repeats: int) -> Iterator[Row]:
    """Speed of both, case by case: in CPU time, and in that of the clock where the disk is read."""
    for name, count in (("one source", 1), (f"blend of {len(WEIGHTS)}", len(WEIGHTS))):
        for masking in (False, True):
            given = (prefixes[:count], WEIGHTS[:count], masking)
            both = (ours(*given), megatrons(*given, samples * (repeats + 1), folder / "cache"))
            case = f"{name}{', documents apart' if masking else ''}"
            yield alternate(f"{case}, warm", [warm(one) for one in both], samples, repeats)
            sides = [cold(one, prefixes) for one in both]
            yield alternate(f"{case}, cold", sides, samples, repeats)


def compare_packings(
    folder: Path, prefixes: Sequence[Path], samples: int, repeats: int
) -> Iterator[Row]:
    """Packings of one source with documents apart, against GPTDataset; DALI against torch."""
    from megatron_trinity.arguments.data import dali_is_installed
    from megatron_trinity.data.packings import PACKINGS

    one = (prefixes[:1], WEIGHTS[:1], True)
    its = megatrons(*one, samples * (repeats + 1), folder / "cache")
    made = {packing: ours(*one, packing) for packing in PACKINGS}
    for packing, mine in made.items():
        mine[0]  # what is packed once an epoch
        yield alternate(f"{packing}, documents apart", [warm(mine), warm(its)], samples, repeats)
    for packing, mine in made.items() if dali_is_installed() else ():
        sides = [warm(mine, through_dali), warm(mine)]
        yield alternate(f"{packing}: DALI against torch's loader", sides, samples, repeats)


def against_tiny(prefix: Path, samples: int, repeats: int) -> Row:
    """What the data give in a second, against 20 times what training of the tiny preset takes."""
    trained = Tiny()
    length = trained.args.seq_length
    batches = random_batches(BATCH, length, trained.args.vocab_size)
    trained.train(next(batches))  # the first step allocates

    def training(_: range) -> float:
        return 20 * tokens_per_second(trained.train(next(batches)) for _ in range(2))

    data = ours([prefix], [1.0], False, length=length)
    case = f"{length} tokens a sample, against 20 times what tiny takes"
    return alternate(case, [warm(data), training], samples, repeats)


class Tiny:
    """The trainer's steps of the tiny preset."""

    def __init__(self) -> None:
        from megatron.training.global_vars import set_global_variables
        from megatron.training.initialize import initialize_megatron

        from megatron_trinity.arguments.parse import parse_arguments
        from megatron_trinity.planning.steps import Steps
        from megatron_trinity.training.vocabulary import settle_vocabulary

        os.environ |= single_rank_environment()
        flags = {
            "--preset": "tiny",
            "--lr-decay-style": "constant",
            "--micro-batch-size": BATCH,
            "--global-batch-size": BATCH,
            "--tokenizer-type": "NullTokenizer",
            "--train-iters": 10**6,
        }
        with contextlib.redirect_stdout(io.StringIO()):  # what Megatron says at its start
            words = [str(word) for pair in flags.items() for word in pair]
            self.args = parse_arguments([*words, "--mock-data"])
            set_global_variables(self.args)
            settle_vocabulary(self.args)
            initialize_megatron()
            self._steps = Steps(self.args, *trainers(self.args))

    def train(self, batch: Any) -> Any:
        self._steps.step(batch)
        return batch


def start_up(folder: Path, documents: int, repeats: int) -> Iterator[Row]:
    """Seconds and memory up to the first sample of many documents, from a cold cache."""
    from megatron_trinity.data.indexed import check_indexed_dataset

    prefix = folder / "many"
    write_indexed(prefix, documents, 9, 100, sparse=True)
    samples = 1000

    def our_start() -> object:
        check_indexed_dataset(prefix)
        return ours([prefix], [1.0], False)[0]

    def its_start() -> object:
        return megatrons([prefix], [1.0], False, samples, folder / f"cache {time.time_ns()}")[0]

    starts, memory = (our_start, its_start), []
    for start in starts:
        drop_from_cache([prefix])
        memory.append(peak_memory(lambda start=start: start) / MIB)  # type: ignore[misc]
    name = f"{documents / 1e6:g} million documents"
    seconds = []
    for _ in range(repeats):
        of_both = []
        for start in starts:
            drop_from_cache([prefix])
            began = [time.perf_counter(), time.process_time()]
            start()
            of_both.append([time.perf_counter() - began[0], time.process_time() - began[1]])
        seconds.append(of_both)
    for number, clock in enumerate(("by the clock", "CPU time")):
        mine, its = (statistics.median(pair[side][number] for pair in seconds) for side in (0, 1))
        yield make_row(f"start, {name}, cold, {clock}", mine, its, "s")
    yield make_row(f"memory, {name}", memory[0], memory[1], "MiB")


def show(rows: Sequence[Row]) -> None:
    """The rows as a table."""
    table = Table("case", "ours", "peer", "unit", "ratio")
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
        rows = list(start_up(folder, 10**6 if options.quick else 10**7, min(repeats, 3)))
        prefixes = write_sources(folder, 4_000 if options.quick else 20_000)
        rows += compare(folder, prefixes, samples, repeats)
        rows += compare_packings(folder, prefixes, samples, repeats)
        rows.append(against_tiny(prefixes[0], samples, repeats))
    show(rows)
    write_rows(options.json, rows)


if __name__ == "__main__":
    run_command(main)
