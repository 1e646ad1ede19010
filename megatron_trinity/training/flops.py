"""Model FLOPs of a training step, for the throughput in the log."""

from __future__ import annotations

from argparse import Namespace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_trinity.planning.flops import pairs_of_layers, training_flops
from megatron_trinity.planning.sizes import ModelSizes


class StepFlops:
    """Counts what a step computes: (query, key) pairs by window and by document.

    State of a step: it is saved nowhere.

    Attributes:
        newest: FLOPs of the newest step that was asked for, over all ranks.
    """

    def __init__(self, args: Namespace) -> None:
        self._sizes = ModelSizes.from_args(args)
        self._length: int = args.seq_length
        self._lengths: list[Tensor] = []
        self.newest = 0.0

    def note(self, lengths: Tensor) -> None:
        """Note the lengths of a micro-batch's documents, `[D]` int64; none are whole sequences."""
        self._lengths.append(lengths)

    def clear(self) -> None:
        """Forget the step that is under way."""
        self._lengths.clear()

    def consume(self) -> tuple[int | None, tuple[int, int] | None]:
        """Tokens of the global batch, and its pairs in global and in local layers; starts again.

        None and None if no documents were noted. Collective over the data-parallel ranks.
        """
        if not self._lengths:
            return None, None
        lengths = torch.cat(self._lengths)
        self._lengths.clear()
        counts = lengths.new_tensor([int(lengths.sum()), *pairs_of_layers(self._sizes, lengths)])
        dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        tokens, global_pairs, local_pairs = counts.tolist()
        return tokens, (global_pairs, local_pairs)

    def flops(self, sequences: int, first: int | None, second: tuple[int, int] | None) -> float:
        """Of a step over all ranks; `first` and `second` are what `consume` gave."""
        if first is None or second is None:
            global_pairs, local_pairs = pairs_of_layers(self._sizes, [self._length])
            first = sequences * self._length
            second = (sequences * global_pairs, sequences * local_pairs)
        self.newest = float(training_flops(self._sizes, first, *second))
        return self.newest
