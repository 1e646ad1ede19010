"""The flags that say which documents are read, the same for the tokenizer and for the data."""

from __future__ import annotations

import argparse

from megatron_trinity.data.documents import DEFAULT_VALID_FRACTION, PYTHON_STDLIB


def add_source_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--source`, a list of where documents are."""
    parser.add_argument(
        "--source",
        nargs="+",
        required=True,
        help=f"directories, text files, .jsonl or .jsonl.gz files, or {PYTHON_STDLIB}",
    )


def add_selection_arguments(parser: argparse.ArgumentParser, valid_fraction: str) -> None:
    """Add `--glob`, `--json-key` and `--valid-fraction`, the last with this help."""
    parser.add_argument("--glob", default="**/*", help="which files of a directory (default **/*)")
    parser.add_argument("--json-key", default="text", help="where a line has its text (text)")
    parser.add_argument(
        "--valid-fraction",
        type=float,
        default=DEFAULT_VALID_FRACTION,
        help=f"{valid_fraction} (default %(default)s)",
    )
