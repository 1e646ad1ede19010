#!/usr/bin/env python3
"""Sum a quickstart run up: its losses, its speed, and a sample of what it learnt to write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_trinity.command_line.scalars import Scalars, read_scalars
from megatron_trinity.errors import TrinityError, run_command
from megatron_trinity.reporting.history import read_history

PROMPT = "def read(self, path):\n"
SAMPLE_TOKENS = 80
VALIDATION_LOSS = "lm loss validation"
SPEED = "tokens per second"


def steps(scalars: Scalars, tag: str) -> Mapping[int, float]:
    """Raises: TrinityError if the run has not written this scalar."""
    if tag not in scalars:
        raise TrinityError(f"TensorBoard's files have no {tag!r}; has the training ended?")
    return scalars[tag]


def generate(hf_dir: Path) -> str:
    """Continue `PROMPT` greedily, with transformers, from the exported directory alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(hf_dir)
    model = AutoModelForCausalLM.from_pretrained(hf_dir)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=SAMPLE_TOKENS, do_sample=False)
    text: str = tokenizer.decode(output[0])
    return text


def summarize(run: Path) -> dict[str, object]:
    """Gather what the run left behind.

    Raises:
        TrinityError: something is missing.
    """
    scalars = read_scalars(run / "tensorboard")
    losses, speeds = steps(scalars, VALIDATION_LOSS), steps(scalars, SPEED)
    batch_tokens = tokens_per_iteration(run / "checkpoints")
    iterations = max(losses)
    manifest = json.loads((run / "data.json").read_text())
    seconds = [batch_tokens / speed for speed in speeds.values()]
    return {
        "validation_loss": losses[iterations],
        "unigram_entropy": manifest["splits"]["valid"]["unigram_entropy_nats"],
        "tokens_per_second": batch_tokens * len(seconds) / sum(seconds),
        "trained_seconds": sum(seconds),
        "resumed_at": resumed_at(run),
        "iterations": iterations,
        "hf_dir": str(run / "hf"),
        "sample": generate(run / "hf"),
    }


def tokens_per_iteration(checkpoints: Path) -> int:
    """Tokens of a global batch, from the arguments that the checkpoint keeps."""
    from megatron_trinity.checkpoint.torch_dist.read import TorchDistCheckpoint

    args = TorchDistCheckpoint(checkpoints).args
    return int(args.global_batch_size * args.seq_length)


def resumed_at(run: Path) -> int | None:
    """The iteration of the last checkpoint that the training was resumed from."""
    iterations = [start["iteration"] for start in read_history(run).starts]
    return next((iteration for iteration in reversed(iterations) if iteration), None)


def show(summary: Mapping[str, object]) -> None:
    table = Table(show_header=False)
    for name, value in summary.items():
        if name != "sample":
            table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else str(value))
    console = Console()
    console.print(table)
    console.print(summary["sample"], highlight=False, markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="directory of the run")
    run = parser.parse_args().run

    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()
    summary = summarize(run)
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    show(summary)


if __name__ == "__main__":
    run_command(main)
