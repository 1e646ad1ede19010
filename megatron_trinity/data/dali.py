"""NVIDIA DALI between the dataset and the training: batches are prepared and copied ahead of time.

DALI reads nothing itself. Its `external_source` is called with the number of the batch, from which,
with the consumed samples that the loader starts from, follows which samples those are: the same
ones in the same order as torch's loader gives. What DALI counts itself is never carried over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_trinity.errors import UsageError


class DaliLoader:
    """Micro-batches of one data-parallel rank; each `iter` begins at the consumed samples."""

    def __init__(
        self,
        dataset: Dataset[Mapping[str, Tensor]],
        consumed_samples: int,
        micro_batch_size: int,
        rank: int,
        ranks: int,
        *,
        device: int | None = None,
        prefetch: int = 2,
    ) -> None:
        """Args:
        dataset: of samples by their number, each with the same keys.
        rank, ranks: data-parallel.
        device: number of the GPU that batches are copied to; None leaves them on the CPU.
        prefetch: batches that are made ahead.

        Raises:
            UsageError: DALI is not installed.
        """
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise UsageError(
                "NVIDIA DALI is not installed: pip install nvidia-dali-cuda130"
            ) from error
        self._dataset, self._consumed, self._size = dataset, consumed_samples, micro_batch_size
        self._rank, self._ranks = rank, ranks
        self._device, self._prefetch = device, prefetch

    def samples(self, batch: int) -> range:
        """Numbers of the samples of the `batch`-th micro-batch."""
        first = self._consumed + (batch * self._ranks + self._rank) * self._size
        return range(first, first + self._size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Endless, as the samples are."""
        from nvidia.dali import fn, pipeline_def, types

        first = {key: value.numpy() for key, value in self._dataset[self._consumed].items()}
        keys = list(first)

        def read(batch: int) -> list[Any]:
            found = [self._dataset[sample] for sample in self.samples(batch)]
            return [np.stack([sample[key].numpy() for sample in found]) for key in keys]

        @pipeline_def(
            batch_size=self._size,
            num_threads=1,
            device_id=self._device,
            prefetch_queue_depth=self._prefetch,
        )
        def pipeline() -> tuple[Any, ...]:
            outputs = fn.external_source(
                read,
                num_outputs=len(keys),
                batch=True,
                dtype=[types.to_dali_type(str(value.dtype)) for value in first.values()],
                ndim=[value.ndim for value in first.values()],
            )
            return tuple(o.gpu() for o in outputs) if self._device is not None else tuple(outputs)

        built = pipeline()
        built.build()
        while True:
            outputs = built.run()
            yield {key: _tensor(one) for key, one in zip(keys, outputs, strict=True)}


def _tensor(batch: Any) -> Tensor:
    """A copy: DALI uses its own memory for a later batch again."""
    dense = batch.as_tensor()
    if hasattr(dense, "__dlpack__"):
        return torch.from_dlpack(dense).clone()
    return torch.from_numpy(np.array(dense))
