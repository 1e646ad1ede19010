"""Attention by block masks against that in chunks of rows, which `test_attention.py` holds to the
formula: forward and backward, by the dense form that torch has of its kernel."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_trinity.model import flexible_attention
from megatron_trinity.model.context_parallel import this_rank_part
from megatron_trinity.model.core_attention import PortableCoreAttention
from megatron_trinity.model.documents import Documents
from tests.distributed.pool import RankPools
from tests.gpu_forms import as_if_flexible
from tests.unit_tests.model.test_attention import core_config

LENGTH, BATCH, HEADS, GROUPS, SIZE = 40, 2, 4, 2, 16
CU_SEQLENS = ((0, 3, 19, 24, 40), (0, 40, 40, 40, 40))
SEES_ALL, WINDOW = 4, 1  # layers; the window is of 7 tokens
PARTS = [(21, 21), (24, 24), (21, 33), (8, 40), (1, 1)]  # queries and keys


def core(layer: int, backend: AttnBackend = AttnBackend.auto, **arguments: Any) -> Any:
    config = core_config(attention_backend=backend, context_parallel_size=2 if arguments else 1)
    return PortableCoreAttention(config, layer, AttnMaskType.causal, "self", **arguments)


def whole() -> tuple[list[Tensor], Tensor]:
    """`[s, b, n, d]` queries, keys and values, and a gradient `[s, b, n * d]` of the output."""
    generator = torch.Generator().manual_seed(1)
    qkv = [
        torch.randn(LENGTH, BATCH, heads, SIZE, generator=generator)
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    return qkv, torch.randn(LENGTH, BATCH, HEADS * SIZE, generator=generator)


def documents(mask: bool) -> Documents | None:
    return Documents.from_cu_seqlens(torch.tensor(CU_SEQLENS), LENGTH) if mask else None


def output_and_gradients(
    attention: Any, qkv: list[Tensor], cotangent: Tensor, of: Documents | None
) -> list[Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in qkv]
    out = attention(*inputs, None, packed_seq_params=of)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


@pytest.mark.parametrize("apart", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("layer", [WINDOW, SEES_ALL], ids=["local", "global"])
def test_block_masks_give_what_rows_give(layer: int, apart: bool) -> None:
    qkv, cotangent = whole()
    with as_if_flexible() as calls:
        got = output_and_gradients(core(layer), qkv, cotangent, documents(apart))
        # Causal attention of whole sequences has a kernel of its own.
        assert calls.call_count == (layer == WINDOW or apart)
        unfused = core(layer, AttnBackend.unfused)
        want = output_and_gradients(unfused, qkv, cotangent, documents(apart))
        assert calls.call_count == (layer == WINDOW or apart)
    for have, expected in zip(got, want, strict=True):
        torch.testing.assert_close(have, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 7, 8, 9, 30])
@pytest.mark.parametrize(("length", "keys"), PARTS)
def test_blocks_are_those_that_torch_finds_token_by_token(
    length: int, keys: int, window: int | None
) -> None:
    starts = Documents.from_cu_seqlens(torch.tensor(CU_SEQLENS), LENGTH).starts[:, :keys]
    starts = starts[:, -length:].contiguous()
    row, column = torch.arange(keys - length, keys)[:, None], torch.arange(keys)
    seen = (column <= row) & (column > row - (window or keys)) & (column >= starts[:, :, None])
    with as_if_flexible():
        mask = flexible_attention.document_mask(starts, keys, window)
    expected = create_block_mask(
        lambda b, h, q, k: seen[b, q, k], BATCH, 1, length, keys, device="cpu", BLOCK_SIZE=8
    )
    for kind in ("kv", "full_kv", "q", "full_q"):
        numbers, blocks = f"{kind}_num_blocks", f"{kind}_indices"
        assert torch.equal(getattr(mask, numbers), getattr(expected, numbers)), kind
        for got, want, used in zip(
            getattr(mask, blocks).flatten(0, 2),
            getattr(expected, blocks).flatten(0, 2),
            getattr(mask, numbers).flatten().tolist(),
            strict=True,
        ):
            assert torch.equal(got[:used], want[:used]), kind
    tokens = torch.stack(
        [
            mask.mask_mod(torch.tensor(b), torch.tensor(0), row - row[0], column)
            for b in range(BATCH)
        ]
    )
    assert torch.equal(tokens, seen)


def test_layers_share_the_masks_of_a_micro_batch() -> None:
    qkv, _ = whole()
    of = documents(True)
    assert of is not None
    with as_if_flexible():
        for layer in range(1, 9):
            core(layer)(*qkv, None, packed_seq_params=of)
    assert set(of.masks) == {7, None}


class HostReads(TorchDispatchMode):
    """Counts what would wait for a device; the kernel is one operation."""

    supports_higher_order_operators = True
    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += "_local_scalar_dense" in str(function) or "nonzero" in str(function)
        return function(*args, **(kwargs or {}))


def test_a_mask_needs_no_value_on_the_host() -> None:
    starts = torch.zeros(BATCH, LENGTH, dtype=torch.int64, device="meta")
    mask = flexible_attention.document_mask(starts, LENGTH, 7)
    assert mask.kv_indices.device.type == "meta"
    assert mask.q_indices is not None
    qkv, cotangent = whole()
    reads = {}
    for backend in (AttnBackend.auto, AttnBackend.unfused):
        of = documents(True)
        with as_if_flexible(), HostReads() as mode:
            output_and_gradients(core(SEES_ALL, backend), qkv, cotangent, of)
        reads[backend.name] = mode.count
    assert reads == {"auto": 0, "unfused": 1}


def test_a_shape_is_compiled_once() -> None:
    """Whatever the documents and the window, forward and backward."""
    from torch._dynamo.utils import counters

    qkv, cotangent = whole()
    compiled = flexible_attention.kernel("aot_eager")
    torch._dynamo.reset()
    counters.clear()
    graphs, results = [], []
    with as_if_flexible(), patch.object(flexible_attention, "kernel", lambda: compiled):
        # A window, and documents in it; then all keys.
        for layer, apart in ((WINDOW, False), (WINDOW, True), (SEES_ALL, True)):
            got = output_and_gradients(core(layer), qkv, cotangent, documents(apart))
            graphs.append(counters["stats"]["unique_graphs"])
            results.append((layer, apart, got))
    assert graphs == [1, 1, 1]
    for layer, apart, got in results:
        unfused = core(layer, AttnBackend.unfused)
        want = output_and_gradients(unfused, qkv, cotangent, documents(apart))
        for have, expected in zip(got, want, strict=True):
            torch.testing.assert_close(have, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("query", "flexible"),
    [
        ({}, False),
        ({"is_cuda": True}, True),
        ({"is_cuda": True, "dtype": torch.float32}, False),
        ({"is_cuda": True, "shape": (1, 4, 127, 128)}, False),
        ({"is_cuda": True, "shape": (1, 4, 256, 96)}, False),
    ],
)
def test_where_there_is_a_kernel(query: dict[str, Any], flexible: bool) -> None:
    values = {"is_cuda": False, "dtype": torch.bfloat16, "shape": (1, 4, 256, 128), **query}
    with patch.object(flexible_attention, "has_triton", lambda: True):
        assert flexible_attention.is_flexible(Mock(**values)) == flexible
    assert not flexible_attention.is_flexible(torch.zeros(1, 4, 256, 128).bfloat16())


def split_over_ranks(
    rank: int, world_size: int, layer: int, apart: bool, comm_type: str
) -> tuple[list[Tensor], list[Tensor], int]:
    """This rank's part by block masks, the same of whole sequences in rows, and calls of masks."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.initialize_model_parallel(context_parallel_size=world_size)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    qkv, cotangent = whole()
    of = documents(apart)
    want = output_and_gradients(core(layer), qkv, cotangent, of)
    split = core(layer, cp_comm_type=comm_type, pg_collection=groups)
    parts = [this_rank_part(tensor, groups.cp) for tensor in (*qkv, cotangent)]
    with as_if_flexible() as calls:
        got = output_and_gradients(split, parts[:3], parts[3], of)
    return got, [this_rank_part(tensor, groups.cp) for tensor in want], calls.call_count


@pytest.mark.parametrize("apart", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("layer", [WINDOW, SEES_ALL], ids=["local", "global"])
@pytest.mark.parametrize("comm_type", ["all_gather", "a2a"])
def test_sequences_over_ranks(ranks: RankPools, layer: int, apart: bool, comm_type: str) -> None:
    calls = []
    for got, want, count in ranks.run(split_over_ranks, layer, apart, comm_type, world_size=2):
        calls.append(count)
        for have, expected in zip(got, want, strict=True):
            torch.testing.assert_close(have, expected, rtol=0, atol=1e-5)
    by_heads = comm_type == "a2a"
    kernel_of_its_own = layer == SEES_ALL and not apart
    # The first chunk of the sequence, on the first rank, has no keys ahead of it.
    in_chunks = [1, 2] if kernel_of_its_own else [2, 2]
    assert calls == ([int(not kernel_of_its_own)] * 2 if by_heads else in_chunks)
