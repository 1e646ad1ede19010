"""Core attention in windows and documents: every kernel against a plain reference in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gpu.machine import Machine, distance, start
from tests.gpu.rows import Row, at_most, beside, skipped

HEADS, GROUPS = 8, 2
GLOBAL = 4
LAYERS = {"local": 1, "global": GLOBAL}  # numbers of layers, of which every fourth is global
BOUND = 1e-2
"""In bf16, of output and gradients: what rounding probabilities and results leave, twice."""
KERNELS = ("flexible", "plain", "Transformer Engine")


def rows(machine: Machine) -> Iterator[Row]:
    start(machine)
    length, window = machine.size((2048, 512), (64, 16))
    with machine.kernels():
        for name in KERNELS:
            if why := missing(machine, name):
                yield skipped(f"{name}: windows and documents", why)
                continue
            for layer in LAYERS:
                for packed in (False, True):
                    yield from values(machine, name, layer, packed, length, window)
        length, window = machine.size((8192, 2048), (64, 16))
        for name in KERNELS[::2]:
            if not missing(machine, name):
                for layer in LAYERS:
                    for packed in (False, True):
                        yield speed(machine, name, layer, packed, length, window)


def missing(machine: Machine, kernel: str) -> str | None:
    """Why a kernel cannot be tried here."""
    from megatron_trinity.model.core_attention import is_flexible
    from megatron_trinity.upstream.installed import find_installed

    if kernel == "Transformer Engine":
        there = not machine.toy and find_installed().transformer_engine
        return None if there else "Transformer Engine is not installed"
    query = torch.empty(1, 1, 128, 128, device=machine.device, dtype=torch.bfloat16)
    if kernel == "flexible" and not is_flexible(query):
        return "Triton cannot compile it here"
    return None


def core(kernel: str, layer: str, window: int, head_dim: int) -> Any:
    """The core attention of a layer, as a backend builds it."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnBackend, AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_trinity.model.core_attention import PortableCoreAttention

    config = TransformerConfig(
        num_layers=GLOBAL,
        hidden_size=HEADS * head_dim,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=head_dim,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        window_size=(window - 1, 0),
        window_attn_skip_freq=GLOBAL,
        attention_backend=AttnBackend.unfused if kernel == "plain" else AttnBackend.auto,
        params_dtype=torch.bfloat16,
        bf16=True,
    )
    module: Any = PortableCoreAttention
    if kernel == "Transformer Engine":
        from megatron_trinity.model.te_attention import TransformerEngineCoreAttention as module
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
    return module(config, LAYERS[layer], AttnMaskType.causal, "self", pg_collection=groups)


def inputs(machine: Machine, length: int) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values `[s, 2, heads, d]`, and the gradient of the output."""
    head_dim = machine.size(128, 16)
    generator = torch.Generator().manual_seed(1)
    drawn = [
        torch.randn(length, 2, heads, head_dim, generator=generator).to(
            machine.device, torch.bfloat16
        )
        for heads in (HEADS, GROUPS, GROUPS, HEADS)
    ]
    return [tensor.requires_grad_() for tensor in drawn[:3]], drawn[3].flatten(2)


def documents(machine: Machine, length: int) -> tuple[Any, Tensor]:
    """Two sequences of documents of many lengths, and where each token's begins, `[2, s]`."""
    from megatron_trinity.model.documents import Documents

    parts = ((1, length // 8 + 3, length // 2, 5), (length // 4, 7, length // 3))
    cumulative = torch.full((2, length + 1), length, dtype=torch.int32)
    for row, lengths in zip(cumulative, parts, strict=True):
        row[: len(lengths) + 1] = torch.tensor([0, *lengths]).cumsum(0)
    packed = Documents.from_cu_seqlens(cumulative.to(machine.device), length)
    return packed, packed.starts


def values(
    machine: Machine, kernel: str, layer: str, packed: bool, length: int, window: int
) -> Iterator[Row]:
    qkv, g = inputs(machine, length)
    given, starts = documents(machine, length) if packed else (None, None)
    module = core(kernel, layer, window, qkv[0].shape[-1])
    out = module(*qkv, None, packed_seq_params=given)
    got = [out, *torch.autograd.grad(out, qkv, g)]
    exact = [tensor.detach().double().requires_grad_() for tensor in qkv]
    mask = seen(length, window if layer == "local" else None, starts, machine.device)
    query, key, value = exact
    out = reference(query, key, value, mask)
    expected = [out, *torch.autograd.grad(out, exact, g.double())]
    case = f"{kernel}: {layer}{', documents' if packed else ''}, bf16"
    for part, one, other in zip(("output", "dq", "dk", "dv"), got, expected, strict=True):
        yield at_most(f"{case}: {part}", distance(one, other), BOUND)


def seen(length: int, window: int | None, starts: Tensor | None, device: torch.device) -> Tensor:
    """Which keys a query sees: `[1 or b, s, s]` bool."""
    query = torch.arange(length, device=device)[:, None]
    key = torch.arange(length, device=device)[None, :]
    mask = (key <= query)[None]
    if window is not None:
        mask = mask & (query - key < window)
    return mask if starts is None else mask & (key >= starts[:, :, None])


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """`[s, b, heads, d]` to `[s, b, n * d]`, with every score held."""
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    k, v = (tensor.repeat_interleave(HEADS // GROUPS, dim=1) for tensor in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return (weights @ v).permute(2, 0, 1, 3).flatten(2)


def speed(machine: Machine, kernel: str, layer: str, packed: bool, length: int, window: int) -> Row:
    """Both passes, beside torch's attention with the same tokens in a mask."""
    qkv, g = inputs(machine, length)
    given, starts = documents(machine, length) if packed else (None, None)
    module = core(kernel, layer, window, qkv[0].shape[-1])
    mask = seen(length, window if layer == "local" else None, starts, machine.device)[:, None]

    def ours() -> None:
        out = module(*qkv, None, packed_seq_params=given)
        torch.autograd.grad(out, qkv, g)

    def masked() -> None:
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in qkv)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        torch.autograd.grad(out.permute(2, 0, 1, 3).flatten(2), qkv, g)

    times = (1e3 * machine.seconds(ours), 1e3 * machine.seconds(masked))
    case = f"{kernel}: {layer}{', documents' if packed else ''}, s = {length}: both passes"
    return beside(case, times, "torch's with a mask of tokens", "ms")
