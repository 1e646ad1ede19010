"""The data that `examples/quickstart.sh` prepares, as benchmarks train on it."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_trinity.errors import UsageError


def add_data_argument(parser: argparse.ArgumentParser, project: Path) -> None:
    """Add `--data`, by default the quickstart's folder in the `project`'s."""
    parser.add_argument(
        "--data",
        type=Path,
        default=project / "runs" / "quickstart",
        help="the quickstart's folder (default runs/quickstart)",
    )


def training_data(given: Path) -> Path:
    """`--data` from the root of the file system, if the quickstart has left data to train on there.

    Raises:
        UsageError: it has not.
    """
    data = given.resolve()
    require_data(data, "data_train.idx")
    return data


def require_data(data: Path, *names: str) -> None:
    """Check that the quickstart has left these files and folders in `data`.

    Raises:
        UsageError: the first that is missing, and how to get it.
    """
    for name in names:
        if not (data / name).exists():
            raise UsageError(
                f"{data} has no {name}; run `bash examples/quickstart.sh`, or give --data DIR"
            )


def data_flags(data: Path) -> dict[str, object]:
    """The trainer's flags to train and validate on it."""
    return {
        "--tokenizer-model": data / "tokenizer",
        "--train-data-path": data / "data_train",
        "--valid-data-path": data / "data_valid",
        "--num-workers": 0,
    }
