"""A rank's shards of Megatron's buffers: where gradients are summed, and weights gathered from.

With `--use-distributed-optimizer` gradients are reduced and scattered bucket by bucket, each rank
has the sum of its own shard alone, and keeps fp32 weights and moments of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_trinity.optimizer.units import MASTER, Place, Unit


class Shard:
    """This rank's part of a bucket, flat.

    Attributes:
        gradients: in the dtype that they are summed in.
        weights: in the model's dtype; the bucket's others are gathered from their ranks.
        first: where it starts in the bucket.
        state: fp32 weights and moments, of which those of units are views.
    """

    def __init__(self, bucket: Any, rank: int, ranks: int) -> None:
        """Args: bucket: Megatron's."""
        size = bucket.grad_data.numel() // ranks
        self.first = rank * size
        self.gradients: Tensor = bucket.grad_data[self.first : self.first + size]
        self.weights: Tensor = bucket.param_data[self.first : self.first + size]
        self.state: dict[str, Tensor] = {}
        # Where gradients are summed up outside of the buffer, that copy is what Megatron works on.
        self.is_summed_here = not bucket.params_with_extra_main_grads

    def keep(self, unit: Unit, place: Place, moments: Sequence[str]) -> None:
        """Let a unit that lies here start to keep fp32 weights and moments."""
        if not self.state:
            self.state[MASTER] = self.weights.float()  # itself, if it is fp32
            for name in moments:
                self.state[name] = torch.zeros_like(self.state[MASTER])
        weights = unit.weights
        start = place.start + unit.rows[0] * weights[0].numel() - self.first
        stop = start + weights.numel()
        unit.state = {
            name: flat[start:stop].view(weights.shape) for name, flat in self.state.items()
        }


class Shards:
    """All of a rank's, by the parameters of their buckets."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        """Args: chunks: Megatron's `DistributedDataParallel`s."""
        self._chunks = chunks
        self.places: dict[nn.Parameter, Place] = {}
        self.all: list[Shard] = []
        self._of: dict[nn.Parameter, Shard] = {}
        for chunk in chunks:
            if chunk.ddp_config.overlap_param_gather:
                _chain_gathers(chunk)
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                group = buffer.data_parallel_group
                for bucket in buffer.buckets:
                    shard = Shard(bucket, group.rank(), group.size())
                    self.all.append(shard)
                    for parameter, (start, _) in bucket.param_to_index.items():
                        self.places[parameter] = Place(start, len(shard.weights))
                        self._of[parameter] = shard

    def keep(self, unit: Unit, moments: Sequence[str]) -> None:
        """Let a unit that lies in this rank's shard start to keep fp32 weights and moments."""
        self._of[unit.parameter].keep(unit, self.places[unit.parameter], moments)

    @property
    def are_summed(self) -> bool:
        """Whether the flat gradients are what Megatron left there last."""
        return all(shard.is_summed_here for shard in self.all)

    def to_model(self) -> None:
        """fp32 weights become this rank's part of the model's."""
        changed = [s for s in self.all if s.state and s.weights.dtype != torch.float32]
        if changed:
            torch._foreach_copy_([s.weights for s in changed], [s.state[MASTER] for s in changed])

    def gather(self, now: bool) -> None:
        """Bring the weights of all ranks into the model.

        Args: now: also where `--overlap-param-gather` has the next forward pass do it.
        """
        for chunk in self._chunks:
            if now or not chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=now)


def _chain_gathers(chunk: Any) -> None:
    """Let each gather start the next one that the forward pass needs, whatever buffer it is of.

    Megatron goes through one buffer after the other.
    """
    order = {parameter: number for number, parameter in enumerate(chunk.module.parameters())}
    groups = sorted(
        (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups),
        key=lambda group: min(order[parameter] for parameter in group.params),
    )
    for group, following in zip(groups, [*groups[1:], None], strict=True):
        group.next_param_gather_bucket_group = following
