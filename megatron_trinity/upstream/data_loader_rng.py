"""Data loaders that leave the random state of the training alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_trinity.upstream.registry import Adaptation, rebind

ADAPTATION = Adaptation(
    name="data-loader-rng",
    symbols=("megatron.training.datasets.data_samplers.build_pretraining_data_loader",),
    reason=(
        "a torch `DataLoader` draws a seed for its workers from the global generator when it "
        "starts an iterator. A resumed run restores the generator and then starts new iterators, "
        "so its dropout masks are not those of the run that was not interrupted"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="`build_pretraining_data_loader` gives its loaders a generator of their own",
)


MakeLoader = Callable[[Any, int], Any]
_make_training_loader: MakeLoader | None = None


def set_training_loader(make: MakeLoader | None) -> None:
    """Let `make(dataset, consumed samples)` give the loader of the training data; None: torch's."""
    global _make_training_loader
    _make_training_loader = make


def install() -> None:
    """Give each loader a generator, seeded like the training."""
    from megatron.core.datasets.utils import Split
    from megatron.training.datasets import data_samplers

    original = data_samplers.build_pretraining_data_loader

    @functools.wraps(original)
    def build_pretraining_data_loader(dataset: Any, consumed_samples: int) -> Any:
        if _make_training_loader is not None and getattr(dataset, "split", None) is Split.train:
            return _make_training_loader(dataset, consumed_samples)
        loader = original(dataset, consumed_samples)
        if isinstance(loader, torch.utils.data.DataLoader) and loader.generator is None:
            loader.generator = torch.Generator().manual_seed(data_samplers.get_args().seed)
        return loader

    rebind(original, build_pretraining_data_loader)
