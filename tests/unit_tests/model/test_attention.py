"""The core attention against a softmax over the full mask, forward and backward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from torch import Tensor

from megatron_trinity.model.attention import causal_attention, window_attention
from megatron_trinity.model.core_attention import PortableCoreAttention, layer_window
from megatron_trinity.model.documents import Documents
from tests.distributed.pool import RankPools
from tests.trinity import afmoe_config, build, parse

SCALE = 0.3
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
# Sequence lengths: none, one and several tokens beyond a multiple of each window.
LENGTHS = (1, 8, 19, 21)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    starts: Tensor | None = None,
) -> Tensor:
    """Every pair in fp64: query t, the last being the last key, sees key u if t - window < u <= t.

    `starts`, `[b, s]`: nor does it see a key ahead of the first of its document.
    """
    query, key, value = (tensor.double() for tensor in (query, key, value))
    ratio = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(ratio, dim=1), value.repeat_interleave(ratio, dim=1)
    column = torch.arange(key.shape[2])
    distance = column[-query.shape[2] :, None] - column
    seen = (distance >= 0) & (distance < (window or key.shape[2]))
    if starts is not None:
        seen = seen & (column >= starts[:, None, :, None])
    logits = (SCALE * query @ key.mT).masked_fill(~seen, -torch.inf)
    return torch.softmax(logits, dim=-1) @ value


def inputs(
    batch: int, heads: int, groups: int, length: int, dtype: torch.dtype, previous: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(batch, n, tokens, 8, generator=generator).to(dtype).requires_grad_()
        for n, tokens in ((heads, length), (groups, previous + length), (groups, previous + length))
    )
    return query, key, value


def fast(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    starts: Tensor | None = None,
) -> Tensor:
    if window is None:
        return causal_attention(query, key, value, SCALE, starts)
    return window_attention(query, key, value, window, SCALE, starts)


def check(
    window: int | None,
    batch: int,
    heads: int,
    groups: int,
    length: int,
    dtype: torch.dtype = torch.float32,
    previous: int = 0,
    starts: Tensor | None = None,
) -> None:
    qkv = inputs(batch, heads, groups, length, dtype, previous)
    expected, got = reference(*qkv, window, starts), fast(*qkv, window, starts)
    assert got.dtype == dtype
    assert got.shape == qkv[0].shape
    cotangent = torch.randn(got.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    wanted = [expected, *torch.autograd.grad(expected, qkv, cotangent.double())]
    found = [got, *torch.autograd.grad(got, qkv, cotangent)]
    for want, have in zip(wanted, found, strict=True):
        # Relative to the largest entry: a gradient sums over as many tokens as there are.
        error = (have.double() - want.double()).abs().max()
        assert error <= TOLERANCE[dtype] * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("heads_and_groups", [(4, 4), (4, 2), (6, 1)])
def test_causal_attention_is_the_full_softmax(
    length: int, heads_and_groups: tuple[int, int], dtype: torch.dtype
) -> None:
    check(None, 2, *heads_and_groups, length, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", ["1", "2", "7", "s - 1", "s", "s + 1", "3 s"])
def test_window_attention_is_the_masked_softmax(
    window: str, length: int, dtype: torch.dtype
) -> None:
    size = {"s - 1": max(length - 1, 1), "s": length, "s + 1": length + 1, "3 s": 3 * length}
    check(size.get(window) or int(window), 2, 4, 2, length, dtype)


@settings(max_examples=60)
@given(
    window=st.integers(1, 40),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    ratio=st.integers(1, 3),
    length=st.integers(1, 40),
)
def test_window_attention_at_any_shape(
    window: int, batch: int, groups: int, ratio: int, length: int
) -> None:
    check(window, batch, groups * ratio, groups, length)


def document_starts(rows: list[list[int]]) -> Tensor:
    """`[b, s]` from the lengths of each row's documents, by plain counting."""
    return torch.tensor(
        [
            [sum(lengths[:number]) for number, length in enumerate(lengths) for _ in range(length)]
            for lengths in rows
        ]
    )


@pytest.mark.parametrize("window", [None, 1, 3, 5, 40])
@pytest.mark.parametrize("rows", [2, 512])
def test_documents_do_not_see_each_other(
    window: int | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_trinity.model.attention.ROWS", rows)
    starts = document_starts([[1, 9, 1, 2], [13], [5, 7, 1], [1] * 13])
    check(window, 4, 4, 2, 13, starts=starts)


@settings(max_examples=80)
@given(
    window=st.one_of(st.none(), st.integers(1, 30)),
    lengths=st.lists(st.integers(1, 15), min_size=1, max_size=6),
    previous=st.integers(0, 30),
    documents=st.booleans(),
)
def test_a_part_of_a_sequence(
    window: int | None, lengths: list[int], previous: int, documents: bool
) -> None:
    """The last tokens of a sequence, with their keys and those ahead of them."""
    keys = sum(lengths)
    length = max(1, keys - previous)
    starts = document_starts([lengths, [keys]])[:, -length:] if documents else None
    check(window, 2, 2, 1, length, previous=keys - length, starts=starts)


@pytest.mark.parametrize("window", [1, 2, 5, 12, 13])
def test_a_window_of_w_sees_exactly_w_keys_with_its_own(window: int) -> None:
    length = 13
    qkv = inputs(1, 1, 1, length, torch.float32)
    _, _, value = qkv
    out = window_attention(*qkv, window, SCALE)
    for token in range(length):
        [gradient] = torch.autograd.grad(out[0, 0, token].sum(), value, retain_graph=True)
        seen = gradient[0, 0].abs().sum(dim=-1).nonzero().flatten().tolist()
        assert seen == list(range(max(token - window + 1, 0), token + 1))


def test_keys_outside_the_window_change_nothing() -> None:
    window, token = 4, 11
    query, key, value = (tensor.detach() for tensor in inputs(1, 2, 2, 15, torch.float32))
    before = window_attention(query, key, value, window, SCALE)[:, :, token]
    for other in range(15):
        moved = key.clone()
        moved[:, :, other] += 1.0 + torch.arange(8) / 8
        after = window_attention(query, moved, value, window, SCALE)[:, :, token]
        assert torch.equal(before, after) == (not token - window < other <= token)


@pytest.mark.parametrize("length", [6, 12])
def test_queries_beside_each_other_in_the_batch_do_not_mix(length: int) -> None:
    query, key, value = (t.detach() for t in inputs(3, 4, 2, length, torch.float32))
    together = window_attention(query, key, value, 4, SCALE)
    for row in range(3):
        one = slice(row, row + 1)
        alone = window_attention(query[one], key[one], value[one], 4, SCALE)
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-6)


def core_config(**changes: Any) -> Any:
    values = {
        "attention_backend": AttnBackend.auto,
        "attention_dropout": 0.0,
        "context_parallel_size": 1,
        "kv_channels": 16,
        "window_attn_skip_freq": 4,
        "window_size": (6, 0),
    }
    return SimpleNamespace(**{**values, **changes})


def core(layer: int = 1, mask_type: AttnMaskType = AttnMaskType.causal, **changes: Any) -> Any:
    return PortableCoreAttention(core_config(**changes), layer, mask_type, "self")


@pytest.mark.parametrize("layer", [1, 4], ids=["local", "global"])
def test_core_attention_has_megatrons_shapes(layer: int) -> None:
    generator = torch.Generator().manual_seed(6)
    query = torch.randn(11, 2, 4, 16, generator=generator)  # [s, b, n, d]
    key, value = (torch.randn(11, 2, 2, 16, generator=generator) for _ in range(2))
    out = core(layer)(query, key, value, None)
    assert out.shape == (11, 2, 64)
    # The reference has SCALE, the module 1/sqrt(16).
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query * 0.25 / SCALE, key, value))
    expected = reference(q, k, v, 7 if layer == 1 else None)
    torch.testing.assert_close(
        out.double(), expected.permute(2, 0, 1, 3).flatten(2), rtol=0, atol=1e-5
    )


def test_core_attention_takes_another_scale() -> None:
    given_scale = PortableCoreAttention(
        core_config(), 1, AttnMaskType.causal, "self", softmax_scale=0.5
    )
    assert given_scale.softmax_scale == 0.5
    assert core().softmax_scale == 16**-0.5


@pytest.mark.parametrize("layer", [1, 4], ids=["local", "global"])
def test_core_attention_keeps_documents_apart(layer: int) -> None:
    generator = torch.Generator().manual_seed(6)
    query = torch.randn(11, 2, 4, 16, generator=generator)  # [s, b, n, d]
    key, value = (torch.randn(11, 2, 2, 16, generator=generator) for _ in range(2))
    cu_seqlens = torch.tensor([[0, 1, 9, 11, 11], [0, 11, 11, 11, 11]], dtype=torch.int32)
    documents = Documents.from_cu_seqlens(cu_seqlens, 11)
    out = core(layer)(query, key, value, None, packed_seq_params=documents)
    for row, begin, end in ((0, 0, 1), (0, 1, 9), (0, 9, 11), (1, 0, 11)):
        part = (slice(begin, end), slice(row, row + 1))
        alone = core(layer)(query[part], key[part], value[part], None)
        torch.testing.assert_close(out[part], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("ignored", "message"),
    [
        ("attention_mask", "no mask and no bias"),
        ("attention_bias", "no mask and no bias"),
        ("packed_seq_params", "documents, not packed tokens"),
    ],
)
def test_what_would_be_ignored_is_refused(ignored: str, message: str) -> None:
    qkv = torch.zeros(3, 1, 2, 16)
    arguments = {"attention_mask": None, ignored: torch.zeros(1, 1, 3, 3)}
    with pytest.raises(ValueError, match=message):
        core()(qkv, qkv, qkv, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_type": AttnMaskType.padding}, "causal"),
        ({"attention_dropout": 0.1}, "dropout"),
        ({"context_parallel_size": 2}, "by None is not one of"),
    ],
    ids=["mask", "dropout", "context parallel"],
)
def test_what_it_cannot_compute_is_refused_when_built(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        core(**changes)


def test_layers_are_numbered_from_one() -> None:
    windows = [layer_window(core_config(), layer) for layer in range(1, 13)]
    assert windows == [7, 7, 7, None] * 3
    every_layer_global = core_config(window_attn_skip_freq=1)
    assert layer_window(every_layer_global, 1) is None


def windows_of_a_model(rank: int, world_size: int) -> list[int | None]:
    model = build(parse(afmoe_config(num_hidden_layers=9, sliding_window=7)))
    return [layer.self_attention.core_attention.window for layer in model.decoder.layers]


def test_a_model_has_its_global_layers_at_4_and_8(ranks: RankPools) -> None:
    [windows] = ranks.run(windows_of_a_model, world_size=1)
    assert windows == [7, 7, 7, None, 7, 7, 7, None, 7]
