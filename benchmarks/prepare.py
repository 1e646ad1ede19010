"""How fast is data prepared, against a plain loop over `encode_batch_fast`, and does it scale?

CPU seconds of JSON lines to an indexed dataset, alternating in one process: ours parses, checks,
assigns splits, encodes, counts and writes datasets with their checksums; the loop parses, encodes a
thousand lines a call and writes ids. Both have one thread. Then seconds and CPU seconds with more
workers, and the largest resident memory of the process that reads, writes and indexes.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_trinity.command_line.parser import command_parser, require_at_least_one
from megatron_trinity.command_line.rows import Row, add_json_argument, make_row, write_rows
from megatron_trinity.errors import run_command

EXAMPLE = """example:
  python benchmarks/prepare.py --megabytes 50 --vocab-size 200000
"""
LINES_OF_A_CALL = 1000
PIECE = 4000  # characters of a document: about what a page of the web has


def write_corpus(path: Path, size: int) -> int:
    """Write the standard library as JSON lines, again and again up to `size` bytes; its bytes."""
    from megatron_trinity.data.documents import PYTHON_STDLIB, SkipReport
    from megatron_trinity.data.listing import source_files
    from megatron_trinity.data.records import iterate_documents

    written = 0
    with open(path, "w", encoding="utf-8") as out:
        for number in range(1_000_000):
            files = source_files([PYTHON_STDLIB], "**/*", SkipReport())
            for document in iterate_documents(files, "text", SkipReport()):
                for start in range(0, len(document.text), PIECE):
                    piece = f"{number} {document.text[start : start + PIECE]}"
                    out.write(json.dumps({"text": piece}) + "\n")
                    written += len(piece.encode())
                    if written >= size:
                        return written
    return written


def make_tokenizer(directory: Path, vocab_size: int) -> None:
    from megatron_trinity.data.documents import PYTHON_STDLIB
    from megatron_trinity.data.tokenizer import TokenizerRequest
    from megatron_trinity.data.tokenizer import make_tokenizer as make

    make(TokenizerRequest((PYTHON_STDLIB,), directory, vocab_size))


def ours(corpus: Path, tokenizer: Path, output: Path, workers: int = 1) -> int:
    """Prepare; the tokens."""
    from megatron_trinity.data.prepare import PrepareRequest, prepare_dataset

    made, _ = prepare_dataset(
        PrepareRequest((str(corpus),), tokenizer, output, workers=workers, overwrite=True)
    )
    return sum(int(split["tokens"]) for split in made["splits"].values())


def peer(corpus: Path, tokenizer: Path, output: Path) -> int:
    """The plain loop; the tokens, with one more for each document's end."""
    import numpy as np
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    tokens = 0
    with open(corpus, encoding="utf-8") as lines, open(f"{output}.bin", "wb") as out:
        for batch in _batches(lines):
            for encoding in model.encode_batch_fast(batch, add_special_tokens=False):
                np.array(encoding.ids, dtype=np.int32).tofile(out)
                tokens += len(encoding.ids) + 1
    return tokens


def _batches(lines: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for line in lines:
        batch.append(json.loads(line)["text"])
        if len(batch) == LINES_OF_A_CALL:
            yield batch
            batch = []
    if batch:
        yield batch


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measured(work: Callable[[], int]) -> tuple[float, float, int]:
    """CPU seconds, seconds, and what `work` returns."""
    cpu, began = cpu_seconds(), time.perf_counter()
    result = work()
    return cpu_seconds() - cpu, time.perf_counter() - began, result


def compare(place: Path, corpus: Path, size: int, repetitions: int) -> list[Row]:
    taken: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(repetitions):
        mine, _, tokens = measured(lambda: ours(corpus, place / "tokenizer", place / "ours"))
        its, _, expected = measured(lambda: peer(corpus, place / "tokenizer", place / "peer"))
        if tokens != expected:
            raise AssertionError(f"ours has {tokens} tokens, the plain loop {expected}")
        taken["ours"].append(mine)
        taken["peer"].append(its)
    mega = size / 1e6
    ours_rate, peer_rate = (mega / statistics.median(taken[kind]) for kind in ("ours", "peer"))
    case = f"{mega:.0f} MB, one worker"
    return [make_row(case, ours_rate, peer_rate, "MB/CPU s", more_is_better=True)]


def scale(place: Path, corpus: Path, size: int, workers: list[int]) -> list[Row]:
    """Wall time with more workers, against one."""
    rows = []
    first = None
    for count in workers:
        cpu, wall, _ = measured(lambda: ours(corpus, place / "tokenizer", place / "s", count))  # noqa: B023
        rate = size / 1e6 / wall
        first = first or rate
        rows.append(
            make_row(f"{count} workers against one", rate, first, "MB/s", more_is_better=True)
        )
        rows.append(make_row(f"{count} workers, CPU", size / 1e6 / cpu, None, "MB/CPU s"))
    return rows


def table(rows: list[Row]) -> Table:
    out = Table("case", "ours", "peer", "unit", "ratio")
    for row in rows:
        peer_, ratio = (
            "" if value is None else f"{value:.2f}" for value in (row["peer"], row["ratio"])
        )
        out.add_row(row["case"], f"{row['ours']:.2f}", peer_, row["unit"], ratio)
    return out


def main() -> None:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--megabytes", type=int, default=20, help="of text (default %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="default %(default)s")
    parser.add_argument("--repetitions", type=int, default=3, help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="3 MB once, within a minute")
    add_json_argument(parser)
    arguments = parser.parse_args()
    require_at_least_one("--repetitions", arguments.repetitions)
    require_at_least_one("--megabytes", arguments.megabytes)
    from megatron_trinity.data.encode import available_cpus

    size = 3_000_000 if arguments.quick else arguments.megabytes * 1_000_000
    repetitions = 1 if arguments.quick else arguments.repetitions
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        make_tokenizer(place / "tokenizer", 4096 if arguments.quick else arguments.vocab_size)
        corpus = place / "corpus.jsonl"
        size = write_corpus(corpus, size)
        ours(corpus, place / "tokenizer", place / "ours")  # imports, outside of what is measured
        rows = compare(place, corpus, size, repetitions)
        cores = available_cpus()
        rows += scale(place, corpus, size, [n for n in (1, 2, 4, 8, 16, 32) if n <= cores])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows.append(make_row("peak memory of the first process", peak, None, "MiB"))
    Console(width=110).print(table(rows))
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    run_command(main)
