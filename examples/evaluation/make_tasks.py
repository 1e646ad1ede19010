#!/usr/bin/env python3
"""Make local tasks for lm-eval from what training leaves out of the Python standard library."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_trinity.command_line.parser import command_parser
from megatron_trinity.data.documents import (
    DEFAULT_VALID_FRACTION,
    PYTHON_STDLIB,
    Document,
    SkipReport,
    assign_split,
)
from megatron_trinity.errors import run_command

EXAMPLE = """example:
  python examples/evaluation/make_tasks.py --output runs/quickstart/evaluation/tasks
"""
TEXT_CHARACTERS = 2000
"""Of a document, for its bits a byte: from its beginning."""
CONTEXT_LINES = 12
CHOICES = 4
QUESTIONS_A_FILE = 8


def main() -> None:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--output", type=Path, required=True, help="directory of the tasks")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    documents = list(held_out())
    texts = [{"text": document.text[:TEXT_CHARACTERS]} for document in documents]
    questions = [question for document in documents for question in next_lines(document)]
    for name, rows in (("stdlib_text", texts), ("stdlib_next_line", questions)):
        (output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = (Path(__file__).parent / f"{name}.yaml").read_text()
        (output / f"{name}.yaml").write_text(task.replace("DATA", str(output.resolve())))
        print(f"{name}: {len(rows)} rows in {output}")


def held_out() -> Iterator[Document]:
    """The documents that the quickstart validates on."""
    from megatron_trinity.data.listing import source_files
    from megatron_trinity.data.records import iterate_documents

    files = source_files((PYTHON_STDLIB,), "**/*", SkipReport(), None)
    for document in iterate_documents(files, "text", SkipReport()):
        if assign_split(document.split_key, DEFAULT_VALID_FRACTION) == "valid":
            yield document


def next_lines(document: Document) -> Iterator[dict[str, object]]:
    """Questions about a file, the same for the same file: some lines, and what may come next.

    Yields: `context`, which ends with a line's end; `choices`, one of which is the next line, the
    others lines of this file from elsewhere; `answer`, the number of the right one.
    """
    chance = random.Random(document.split_key)
    lines = document.text.splitlines()
    asked = [i for i in range(CONTEXT_LINES, len(lines)) if _tells(lines[i])]
    others = sorted({line for line in lines if _tells(line)})
    for i in sorted(chance.sample(asked, min(QUESTIONS_A_FILE, len(asked)))):
        wrong = [line for line in others if line != lines[i]]
        if len(wrong) < CHOICES - 1:
            return
        choices = [lines[i], *chance.sample(wrong, CHOICES - 1)]
        chance.shuffle(choices)
        yield {
            "context": _text(lines[i - CONTEXT_LINES : i]),
            "choices": choices,
            "answer": choices.index(lines[i]),
        }


def _tells(line: str) -> bool:
    """Whether a line has so much in it that it can be told from others."""
    return len(line.strip()) >= 12


def _text(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    run_command(main)
