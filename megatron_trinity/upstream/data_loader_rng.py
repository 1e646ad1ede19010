"""Data loaders that leave the random state of the training alone.

Reason: a torch `DataLoader` draws a seed for its workers from the global generator when it starts
an iterator. A resumed run restores the generator and then starts new iterators, so its dropout
masks are not those of the run that was not interrupted.
Written for: megatron-core 0.19.2.
Remove when: `build_pretraining_data_loader` gives its loaders a generator of their own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.training import get_args
from megatron.training.datasets import data_samplers

from megatron_trinity.upstream.registry import rebind


def install() -> None:
    """Give each loader a generator, seeded like the training."""
    original = data_samplers.build_pretraining_data_loader

    @functools.wraps(original)
    def build_pretraining_data_loader(dataset: Any, consumed_samples: int) -> Any:
        loader = original(dataset, consumed_samples)
        if isinstance(loader, torch.utils.data.DataLoader) and loader.generator is None:
            loader.generator = torch.Generator().manual_seed(get_args().seed)
        return loader

    rebind(original, build_pretraining_data_loader)
