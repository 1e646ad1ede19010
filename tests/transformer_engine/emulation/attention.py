"""cuDNN's attention: causal, within a window, of whole sequences or of documents.

Shapes: s queries, t keys, h heads of queries, g heads of keys and values, d head_dim, all of one
sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.emulation.extension import emulates
from tests.transformer_engine.emulation.sequences import lengths_of


@dataclass(frozen=True)
class Problem:
    """What both directions are told.

    Attributes:
        layout: such as NVTE_SBHD_SBHD_SBHD; the first letter says where sequences are.
        mask: name of the kind of mask.
        window: keys ahead of and behind a query's own that it sees, -1 for all.
        bottom_right: whether the last query stands at the last key, or the first at the first.
        lengths: of the sequences of queries and of keys.
    """

    layout: str
    mask: str
    window: tuple[int, int]
    bottom_right: bool
    scale: float
    lengths: tuple[list[int], list[int]]

    @classmethod
    def of(
        cls,
        layout: Any,
        mask: Any,
        window: Any,
        bottom_right: bool,
        scale: float,
        cu_seqlens: tuple[Tensor, Tensor],
        cu_seqlens_padded: tuple[Tensor | None, Tensor | None],
    ) -> Problem:
        for real, padded in zip(cu_seqlens, cu_seqlens_padded, strict=True):
            if padded is not None and not torch.equal(real, padded):
                raise NotImplementedError("padding between sequences is not emulated")
        q_lengths, kv_lengths = (lengths_of(each) for each in cu_seqlens)
        name = layout.name.removeprefix("NVTE_")
        return cls(name, mask.name, tuple(window), bottom_right, scale, (q_lengths, kv_lengths))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Of all sequences, in the layout of `query`."""
        if self.layout[0] == "T":
            of_queries, of_keys = self.lengths
            parts = (query.split(of_queries), key.split(of_keys), value.split(of_keys))
        else:
            axis = 1 if self.layout[0] == "S" else 0
            parts = (query.unbind(axis), key.unbind(axis), value.unbind(axis))
        outputs = [self._one(q, k, v) for q, k, v in zip(*parts, strict=True)]
        return torch.cat(outputs) if self.layout[0] == "T" else torch.stack(outputs, axis)

    def _one(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`[s, h, d]` queries, `[t, g, d]` keys and values; in fp32 but for the result."""
        repeats = query.shape[1] // key.shape[1]
        k, v = (tensor.float().repeat_interleave(repeats, 1) for tensor in (key, value))
        scores = torch.einsum("ihd,jhd->hij", query.float(), k) * self.scale
        scores = scores.masked_fill(self._hidden(len(query), len(key)), float("-inf"))
        return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).to(query.dtype)

    def _hidden(self, queries: int, keys: int) -> Tensor:
        """`[s, t]`, True where a query does not see a key."""
        offset = keys - queries if self.bottom_right else 0
        own, column = torch.arange(queries)[:, None] + offset, torch.arange(keys)
        left, right = self.window
        if "CAUSAL" in self.mask:
            right = 0
        hidden = torch.zeros(queries, keys, dtype=torch.bool)
        if left >= 0:
            hidden |= column < own - left
        if right >= 0:
            hidden |= column > own + right
        return hidden


@emulates
def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    scale: float,
    dropout: float,
    fast_zero_fill: bool,
    layout: Any,
    o_format: Any,
    scale_inv_format: Any,
    bias_type: Any,
    mask: Any,
    softmax_type: Any,
    window: Any,
    bottom_right: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fake_dtype: torch.dtype,
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    page_table_k: Tensor | None,
    page_table_v: Tensor | None,
    s_quantizer: Any,
    o_quantizer: Any,
    bias: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    """The output, and in the place of the statistics nothing: backward makes them anew."""
    if s_quantizer is not None or bias is not None:
        raise NotImplementedError("attention with a bias or in FP8 is not emulated")
    cu_seqlens = (cu_seqlens_q, cu_seqlens_kv)
    _check_longest((max_seqlen_q, max_seqlen_kv), cu_seqlens)
    padded = (cu_seqlens_q_padded, cu_seqlens_kv_padded)
    problem = Problem.of(layout, mask, window, bottom_right, scale, cu_seqlens, padded)
    return [problem.attend(q, k, v), torch.zeros(1), torch.zeros(2, dtype=torch.int64)]


@emulates
def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    scale: float,
    dropout: float,
    fast_zero_fill: bool,
    layout: Any,
    o_format: Any,
    do_format: Any,
    dqkv_layout: Any,
    scale_inv_format: Any,
    do_scale_inv_format: Any,
    bias_type: Any,
    mask: Any,
    softmax_type: Any,
    window: Any,
    bottom_right: bool,
    deterministic: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    d_o: Tensor,
    fake_dtype: torch.dtype,
    aux: Any,
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    *rest: Any,
) -> list[Tensor | None]:
    """Gradients of queries, keys and values, by autograd through the forward."""
    cu_seqlens = (cu_seqlens_q, cu_seqlens_kv)
    padded = (cu_seqlens_q_padded, cu_seqlens_kv_padded)
    problem = Problem.of(layout, mask, window, bottom_right, scale, cu_seqlens, padded)
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    with torch.enable_grad():
        output = problem.attend(*leaves)
    gradients = torch.autograd.grad(output, leaves, d_o.view_as(output))
    return [*gradients, None, None]


def _check_longest(stated: tuple[int, int], cu_seqlens: tuple[Tensor, Tensor]) -> None:
    """A kernel with too small a maximum would leave rows out, without a word."""
    for longest, each in zip(stated, cu_seqlens, strict=True):
        assert max(lengths_of(each)) <= longest, (longest, each)
