"""Initial weights, the same in every layout.

Each matrix is drawn whole from a generator seeded by its canonical name, and a rank keeps the part
that it holds.
"""

from __future__ import annotations

import hashlib

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_trinity.model.shards import Shard, model_shards

TRUNCATION = 3.0
"""Weights are cut at this many sigmas (report, eq. 37)."""


def initialize_weights(model: MegatronModule, sigma: float, seed: int) -> None:
    """Fill every matrix of `model` from TruncNormal(0, sigma^2; [-3 sigma, 3 sigma]), in place.

    Vectors (norm gains, expert biases) keep the values they were built with; the report's rule is
    for all other trainable parameters, with no scaling by depth (report, eq. 37-38). Tensors on the
    meta device have no values to set and are left out.
    """
    with torch.no_grad():
        for shard in model_shards(model):
            if len(shard.matrix_shape) >= 2 and not shard.data.is_meta:
                whole = truncated_normal(shard.matrix_shape, sigma, matrix_seed(seed, shard))
                shard.data.copy_(shard.of(whole))


def truncated_normal(shape: tuple[int, ...], sigma: float, seed: int) -> Tensor:
    """An fp32 tensor from TruncNormal(0, sigma^2; [-3 sigma, 3 sigma]), drawn on the CPU."""
    bound = TRUNCATION * sigma
    return torch.nn.init.trunc_normal_(
        torch.empty(shape, device="cpu"),
        std=sigma,
        a=-bound,
        b=bound,
        generator=torch.Generator().manual_seed(seed),
    )


def matrix_seed(seed: int, shard: Shard) -> int:
    """The seed of the matrix that `shard` is a part of; differs by name and by expert."""
    digest = hashlib.blake2b(f"{seed}/{shard.key}/{shard.index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes seeds up to 2**63 - 1
