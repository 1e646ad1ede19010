"""What only a GPU can show: correctness held to bounds, speed and memory beside peers.

Each subject runs in a process of its own, so that one that fails does not stop the others. Exit
code 0: every claim of correctness holds. 1: one does not, or a subject failed. 2: usage, or no GPU.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_trinity.command_line.parser import command_parser, require_parent
from megatron_trinity.errors import TrinityError, UsageError, run_command
from tests.gpu.children import failure_of
from tests.gpu.rows import Row, failed, print_rows, read_rows, write_json

EXAMPLE = """example:
  bash tests/run_gpu.sh
  bash tests/run_gpu.sh --json rows.json attention muon
  bash tests/run_gpu.sh --wheels wheels
"""
SUBJECTS = {
    "norm": "the norm's kernels against fp64",
    "attention": "kernels for windows and documents against a plain reference",
    "experts": "grouped products against fp64, beside a product for each expert",
    "loss": "the head and the loss in chunks against fp64, and their memory",
    "muon": "Newton-Schulz against fp64, and a step beside Megatron's and torch's",
    "layers": "portable layers against Transformer Engine's, logits and gradients",
    "fp8": "losses of each recipe beside those of bf16",
    "resume": "bitwise with --deterministic-mode, and what two runs without it differ by",
    "saves": "checkpoints written behind the steps are those written between them",
    "speed": "tokens per second, MFU and memory of nano and of blocks of mini and large",
}
"""In the order in which they run: the quick ones first."""
LIMIT = 3600
"""Seconds of a subject."""


def main() -> None:
    arguments = parse_command_line()
    machine = describe(arguments.toy)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for subject in arguments.subjects or SUBJECTS:
            print(f"{subject}: {SUBJECTS.get(subject, 'not of this suite')}", flush=True)
            rows += run_subject(subject, arguments.toy, Path(scratch))
    print_rows(machine, rows)
    if arguments.json:
        write_json(arguments.json, machine, rows)
    wrong = [row for row in rows if row.fails]
    if wrong:
        first = f"{wrong[0].subject}, {wrong[0].case}: {wrong[0].verdict}"
        raise TrinityError(f"{len(wrong)} of {len(rows)} rows fail: {first}")


def parse_command_line(argv: Sequence[str] | None = None) -> Namespace:
    parser = command_parser(__doc__, EXAMPLE)
    listed = "; ".join(f"{name}: {what}" for name, what in SUBJECTS.items())
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"default all: {listed}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument(
        "--toy", action="store_true", help="on the CPU, at toy size: does the suite itself work?"
    )
    arguments = parser.parse_args(argv)
    require_parent("--json", arguments.json)
    unknown = [name for name in arguments.subjects if name not in SUBJECTS and "." not in name]
    if unknown:
        raise UsageError(f"no subject {unknown[0]}; there are {', '.join(SUBJECTS)}")
    return arguments


def describe(toy: bool) -> str:
    """The machine, in words.

    Raises:
        UsageError: it has no GPU.
    """
    import torch

    if toy:
        return f"a CPU with stand-ins, at toy size: torch {torch.__version__}"
    if not torch.cuda.is_available():
        raise UsageError(
            "there is no GPU here; --toy runs the suite at toy size on the CPU, and bash "
            "tests/run.sh every test that needs none"
        )
    number, name = torch.cuda.device_count(), torch.cuda.get_device_name()
    return f"{number} x {name}: torch {torch.__version__}, CUDA {torch.version.cuda}"


def run_subject(subject: str, toy: bool, scratch: Path) -> list[Row]:
    """Its rows, and one more if it failed."""
    file, output = scratch / f"{subject}.rows", scratch / f"{subject}.output"
    words = ["-m", "tests.gpu.subject", subject, str(file), *(["--toy"] if toy else [])]
    failure = failure_of(words, output, LIMIT)
    rows = read_rows(file, subject)
    if failure is not None:
        rows.append(replace(failed("runs to its end", failure.told), subject=subject))
    return rows


if __name__ == "__main__":
    run_command(main)
