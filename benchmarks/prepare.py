"""How fast is data prepared, against a plain loop over `encode_batch_fast`, and does it scale?

CPU seconds of one core on JSON lines, alternating a megabyte at a time, the least of all
repetitions for each. Ours parses, checks, assigns splits, encodes and puts datasets together; the
loop parses, encodes, and makes an array of each document's ids. Then the whole command, from its
start to the datasets with their checksums, with more and more workers.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_trinity.command_line.parser import command_parser, require_at_least_one
from megatron_trinity.command_line.rows import Row, add_json_argument, make_row, write_rows
from megatron_trinity.errors import run_command

EXAMPLE = """example:
  python benchmarks/prepare.py --megabytes 50 --vocab-size 200000
"""
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
    """Both ways of each chunk, one behind the other."""
    import numpy as np
    from tokenizers import Tokenizer

    from megatron_trinity.data.chunks import Chunk, chunks_of
    from megatron_trinity.data.documents import SkipReport
    from megatron_trinity.data.encode import ChunkEncoder, Encoding
    from megatron_trinity.data.listing import source_files
    from megatron_trinity.data.token_model import load_tokenizer

    tokenizer = load_tokenizer(place / "tokenizer")
    encoder = ChunkEncoder(Encoding(tokenizer, "text", 0.05, append_eod=False))
    model = Tokenizer.from_file(str(place / "tokenizer" / "tokenizer.json"))

    def ours(chunk: Chunk) -> int:
        return sum(len(found.ids) for found in encoder.encode(chunk).splits.values())

    def peer(chunk: Chunk) -> int:
        texts = [json.loads(line)["text"] for line in chunk.lines.splitlines()]
        found = model.encode_batch_fast(texts, add_special_tokens=False)
        return sum(len(np.array(one.ids, dtype=np.int32)) for one in found)

    least: dict[tuple[str, int], float] = {}
    for repetition in range(repetitions):
        files = source_files([str(corpus)], "**/*", SkipReport())
        for number, chunk in enumerate(chunks_of(files, "text")):
            tokens = set()
            ways = (("ours", ours), ("peer", peer))
            for kind, work in ways if repetition % 2 else reversed(ways):
                began = time.thread_time()
                tokens.add(work(chunk))
                taken = time.thread_time() - began
                least[kind, number] = min(taken, least.get((kind, number), taken))
            if len(tokens) != 1:
                raise AssertionError(f"ours and the plain loop have {tokens} tokens")
    mine, its = (
        size / 1e6 / sum(taken for (of, _), taken in least.items() if of == kind)
        for kind in ("ours", "peer")
    )
    return [make_row(f"{size / 1e6:.0f} MB, one core", mine, its, "MB/CPU s", more_is_better=True)]


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
        rows = compare(place, corpus, size, repetitions)
        cores = available_cpus()
        rows += scale(place, corpus, size, [n for n in (1, 2, 4, 8, 16, 32) if n <= cores])
    Console(width=110).print(table(rows))
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    run_command(main)
