"""Sequences of different lengths, one behind another (thd) or padded to the longest (bshd)."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.transformer_engine.emulation.extension import emulates


def lengths_of(cu_seqlens: Tensor) -> list[int]:
    """`[n + 1]` cumulative lengths to n lengths."""
    return (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()


@emulates
def convert_thd_to_bshd(
    tensor: Tensor, cu_seqlens: Tensor, batch_size: int, max_seqlen: int
) -> Tensor:
    """`[t, h, d]` to `[n, longest, h, d]`, with zeros behind the end of a sequence."""
    padded = tensor.new_zeros(batch_size, max_seqlen, *tensor.shape[1:])
    for row, part in zip(padded, tensor.split(lengths_of(cu_seqlens)), strict=True):
        row[: len(part)] = part
    return padded


@emulates
def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The inverse of `convert_thd_to_bshd`."""
    packed = torch.cat(
        [row[:length] for row, length in zip(tensor, lengths_of(cu_seqlens), strict=True)]
    )
    assert len(packed) == num_tokens
    return packed
