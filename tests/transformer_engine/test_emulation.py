"""Transformer Engine's own modules, over the emulation, compute what plain torch does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.pool import RankPools

DTYPES = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
WINDOWS = (None, 1, 3, 100)


def errors(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Of each tensor, relative to the norm of what it should be."""
    return [
        float((a.float() - b.float()).norm() / b.float().norm())
        for a, b in zip(got, expected, strict=True)
    ]


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of a random linear function of the output, the same for every output of one shape."""
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(output.shape, generator=generator).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, cotangent)]


def linear(rank: int, world_size: int, dtype: torch.dtype) -> tuple[list[float], int]:
    import transformer_engine.pytorch as te

    from tests.transformer_engine.emulation.extension import calls

    layer = te.Linear(24, 16, bias=False, params_dtype=dtype, device="cpu")
    x = noise(5, 2, 24, dtype=dtype).requires_grad_()
    calls.clear()
    got = gradients(layer(x), [x, layer.weight])
    return errors(got, gradients(x @ layer.weight.t(), [x, layer.weight])), calls["generic_gemm"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(te_ranks: RankPools, dtype: torch.dtype) -> None:
    [(found, products)] = te_ranks.run(linear, dtype, world_size=1)
    assert max(found) <= DTYPES[dtype]
    assert products == 3, "forward, gradient of the input, gradient of the weight"


def grouped(rank: int, world_size: int, dtype: torch.dtype) -> tuple[list[float], int]:
    import transformer_engine.pytorch as te

    from tests.transformer_engine.emulation.extension import calls

    counts = [4, 0, 7]
    layer = te.GroupedLinear(3, 24, 16, bias=False, params_dtype=dtype, device="cpu")
    weights = [layer.weight0, layer.weight1, layer.weight2]
    x = noise(sum(counts), 24, dtype=dtype).requires_grad_()
    calls.clear()
    got = gradients(layer(x, counts), [x, *weights])
    of_empty = got.pop(3)
    assert of_empty.count_nonzero() == 0
    parts = zip(x.split(counts), weights, strict=True)
    plain = gradients(torch.cat([a @ w.t() for a, w in parts]), [x, *weights])
    del plain[3]
    return errors(got, plain), calls["te_general_grouped_gemm"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_linear_with_an_empty_group(te_ranks: RankPools, dtype: torch.dtype) -> None:
    [(found, products)] = te_ranks.run(grouped, dtype, world_size=1)
    assert max(found) <= DTYPES[dtype]
    assert products == 3


def plain_attention(window: int | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[s, h, d]` queries that are the last of `[t, g, d]` keys; fp64."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(repeats, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.double(), k) * q.shape[-1] ** -0.5
    own = torch.arange(len(q))[:, None] + len(k) - len(q)
    column = torch.arange(len(k))
    hidden = column > own if window is None else (column > own) | (column <= own - window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v).flatten(1).to(q.dtype)


def attention(
    rank: int, world_size: int, dtype: torch.dtype, window: int | None, packed: bool
) -> tuple[list[float], int]:
    """Of sequences of one length, or packed ones with fewer queries than keys."""
    import transformer_engine.pytorch as te

    from tests.transformer_engine.emulation.extension import calls

    calls.clear()
    kernel = te.DotProductAttention(
        4,
        8,
        num_gqa_groups=2,
        attention_dropout=0.0,
        attn_mask_type="causal",
        # Else its plain torch takes the lengths of the queries for those of the keys.
        attention_type="cross" if packed else "self",
    )
    sides: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
    if packed:
        lengths, keys = [3, 1, 6], [5, 1, 6]
        cumulative = [
            torch.tensor([0, *each]).cumsum(0).to(torch.int32) for each in (lengths, keys)
        ]
        q, k, v = (noise(sum(n), h, 8) for n, h in ((lengths, 4), (keys, 2), (keys, 2)))
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        output = kernel(
            *leaves,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            cu_seqlens_q=cumulative[0],
            cu_seqlens_kv=cumulative[1],
            max_seqlen_q=6,
            max_seqlen_kv=6,
            **sides,
        )
        parts = zip(
            leaves[0].split(lengths), leaves[1].split(keys), leaves[2].split(keys), strict=True
        )
        expected = torch.cat([plain_attention(window, *part) for part in parts])
    else:
        q, k, v = (noise(9, 2, h, 8) for h in (4, 2, 2))
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        output = kernel(*leaves, qkv_format="sbhd", **sides)
        expected = torch.stack(
            [plain_attention(window, *(x[:, i] for x in leaves)) for i in range(2)], 1
        )
    found = errors(gradients(output, leaves), gradients(expected, leaves))
    return found, calls["fused_attn_fwd"] + calls["fused_attn_bwd"]


@pytest.mark.parametrize("packed", [False, True], ids=["sequences", "packed"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(
    te_ranks: RankPools, dtype: torch.dtype, window: int | None, packed: bool
) -> None:
    [(found, kernels)] = te_ranks.run(attention, dtype, window, packed, world_size=1)
    if window == 1:
        # A query that sees itself alone has no choice: the gradients of its logits are rounding.
        found = [found[0], found[3]]
    assert max(found) <= 2 * DTYPES[dtype]
    # fp32 takes the plain torch that Transformer Engine has itself, 16 bits cuDNN's.
    assert kernels == (0 if dtype == torch.float32 else 2)


def adam(rank: int, world_size: int) -> float:
    from transformer_engine.pytorch.optimizers import FusedAdam

    start, steps = noise(33), [noise(33) for _ in range(4)]
    ends = []
    for optimizer in (FusedAdam, torch.optim.AdamW):
        weight = torch.nn.Parameter(start.clone())
        stepper = optimizer([weight], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3)
        for step in steps:
            weight.grad = step.clone()
            stepper.step()
        ends.append(weight.detach())
    return float((ends[0] - ends[1]).abs().max())


def test_adam(te_ranks: RankPools) -> None:
    assert te_ranks.run(adam, world_size=1)[0] <= 1e-6


def quantized(rank: int, world_size: int) -> None:
    from transformer_engine.pytorch.tensor import NVFP4Quantizer

    NVFP4Quantizer()(noise(32, 32))


def test_what_is_not_emulated_says_so(te_ranks: RankPools) -> None:
    with pytest.raises(Exception, match="is not emulated"):
        te_ranks.run(quantized, world_size=1)
