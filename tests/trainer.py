"""Runs of the real trainer inside ranks of a pool, and what they leave behind."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.trinity import afmoe_config

VOCAB_SIZE = 160
SEQUENCE = 32
FULL_RECOMPUTE = (
    *("--recompute-granularity", "full"),
    *("--recompute-method", "uniform", "--recompute-num-layers", "1"),
)


def write_dataset(prefix: Path, documents: int = 120, seed: int = 3) -> None:
    """An indexed dataset of random documents, as `tools/prepare_data.py` writes it."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    generator = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(
        f"{prefix}.bin", dtype=DType.optimal_dtype(VOCAB_SIZE), multimodal=False
    )
    for _ in range(documents):
        length = int(generator.integers(5, 90))
        # Tokens that follow from each other, so that there is something to learn.
        start = int(generator.integers(VOCAB_SIZE))
        tokens = (start + np.arange(length) * int(generator.integers(1, 4))) % VOCAB_SIZE
        builder.add_document(torch.from_numpy(tokens), [length])
    builder.finalize(f"{prefix}.idx")


def training_flags(data: Path, *flags: str) -> list[str]:
    """The command line of a small run over the dataset `data`; `flags` come last and win."""
    from megatron_trinity.checkpoint.hf.config import flags_from_hf_config

    config = afmoe_config(vocab_size=VOCAB_SIZE, num_hidden_layers=4, sliding_window=8)
    run = {
        "--tokenizer-type": "NullTokenizer",
        "--train-data-path": str(data),
        "--valid-data-path": str(data),
        "--seq-length": str(SEQUENCE),
        "--micro-batch-size": "2",
        "--global-batch-size": "8",
        "--lr": "2e-3",
        "--lr-warmup-iters": "2",
        "--clip-grad": "1.0",
        "--weight-decay": "0.01",
        "--eval-iters": "1",
        "--eval-interval": "1000",
        "--log-interval": "1",
        "--num-workers": "0",
        "--adamw-lr": "1e-3",
    }
    words = [word for pair in run.items() for word in pair]
    return [*flags_from_hf_config(config), *words, *flags]


def run_trainer(rank: int, world_size: int, flags: Sequence[str]) -> int:
    """Train in this process; returns the exit code."""
    from megatron_trinity.errors import Stopped
    from megatron_trinity.training.pretrain import pretrain

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    try:
        pretrain(flags)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    except Stopped as stopped:
        return stopped.exit_code
    return 0


def checkpoint_contents(directory: Path, iteration: int) -> dict[str, Tensor]:
    """Every tensor of a `torch_dist` checkpoint, the optimizer's as well, by its key."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    path = directory / f"iter_{iteration:07d}"
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, checkpoint_id=path, no_dist=True)
    return tensors


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    """What a run has written of one kind so far, of all its processes, lost steps as well."""
    try:
        lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in whole if event["kind"] == kind]


def steps_of(run: Path) -> list[int]:
    """The steps that it has ended so far, likewise."""
    return [event["iteration"] for event in events_of(run, "step")]


def logged(directory: Path, tag: str) -> dict[int, float]:
    """Step to value of a TensorBoard scalar; of several runs, the last value of a step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}
