"""The flags that say which documents are read, the same for the tokenizer and for the data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_trinity.data.documents import DEFAULT_VALID_FRACTION, PYTHON_STDLIB
from megatron_trinity.data.formats import Kind


def add_source_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--source`, a list of where documents are."""
    parser.add_argument(
        "--source",
        nargs="+",
        required=True,
        help="directories, text, JSON lines (.jsonl, .json, .ndjson; .gz, .zst, .bz2, .xz), "
        "Parquet or Arrow, `datasets` directories, URLs (s3://, hf://datasets/OWNER/NAME, ...), "
        f"@LIST (a source a line), - (standard input), or {PYTHON_STDLIB}",
    )


def add_selection_arguments(parser: argparse.ArgumentParser, valid_fraction: str) -> None:
    """Add `--glob`, `--json-key`, `--format` and `--valid-fraction`, the last with this help."""
    parser.add_argument("--glob", default="**/*", help="which files of a directory (default **/*)")
    parser.add_argument("--json-key", default="text", help="key or column of the text (text)")
    parser.add_argument(
        "--format",
        choices=[kind.value for kind in Kind],
        help="what all files hold (default: what the name of each says)",
    )
    parser.add_argument(
        "--valid-fraction",
        type=float,
        default=DEFAULT_VALID_FRACTION,
        help=f"{valid_fraction} (default %(default)s)",
    )


def format_of_arguments(arguments: argparse.Namespace) -> Kind | None:
    """What `--format` says."""
    return None if arguments.format is None else Kind(arguments.format)


def print_datasets(made: dict[str, Any], manifest_path: Path) -> None:
    """Print what a manifest of datasets says of each split, and of what was left out."""
    for name, split in made["splits"].items():
        ratio = split["bytes"] / max(split["tokens"], 1)
        print(
            f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, "
            f"{split['bytes'] / 1e6:,.1f} MB, {ratio:.2f} bytes a token, "
            f"unigram entropy {split['unigram_entropy_nats']:.3f} nats"
        )
    for reason, found in made["skipped"].items():
        print(f"left out: {found['count']:,} {reason} (named in {manifest_path})")
