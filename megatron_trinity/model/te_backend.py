"""The backend with Transformer Engine's modules: products of matrices and the core attention.

Norms stay the project's, in modules of their own: Transformer Engine fuses none whose gain is fp32
in front of a layer that is not. Router, embedding, LM head and loss are the same in both backends,
and so are the names and the contents of a checkpoint.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TELinear,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from torch import Tensor

from megatron_trinity.model.layer_specs import PortableBackend
from megatron_trinity.model.te_attention import TransformerEngineCoreAttention


class _WithoutState:
    """A layer whose checkpoint is its weights.

    FP8 with delayed scales has histories beside them, which Transformer Engine pickles and, as
    pickles may run anything, does not load again by itself. So they start anew with each start.
    """

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)


class _Linear(_WithoutState, TELinear):
    pass


class _ColumnParallelLinear(_WithoutState, TEColumnParallelLinear):
    pass


class _RowParallelLinear(_WithoutState, TERowParallelLinear):
    pass


class _ColumnParallelGroupedLinear(_WithoutState, TEColumnParallelGroupedLinear):
    pass


class _RowParallelGroupedLinear(_WithoutState, TERowParallelGroupedLinear):
    pass


class TransformerEngineBackend(PortableBackend):
    """Transformer Engine's modules where Trinity can have them, the portable ones elsewhere."""

    def linear(self) -> type[TELinear]:
        return _Linear

    def column_parallel_linear(self) -> type[TEColumnParallelLinear]:
        return _ColumnParallelLinear

    def row_parallel_linear(self) -> type[TERowParallelLinear]:
        return _RowParallelLinear

    def core_attention(self) -> type[TransformerEngineCoreAttention]:
        return TransformerEngineCoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> partial[Any]:
        if not moe_use_grouped_gemm:
            return super().grouped_mlp_modules(moe_use_grouped_gemm)
        return partial(
            TEGroupedMLP,
            submodules=GroupedMLPSubmodules(
                linear_fc1=_ColumnParallelGroupedLinear,
                linear_fc2=_RowParallelGroupedLinear,
                activation_func=None,
            ),
        )
