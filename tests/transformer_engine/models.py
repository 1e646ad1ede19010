"""One model with random weights on either backend: its logits and the gradient of every tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.trinity import afmoe_config, build, load_whole_tensors, parse

TE = ("--transformer-impl", "transformer_engine", "--moe-grouped-gemm")
BATCH = 2


def run_model(
    rank: int,
    world_size: int,
    overrides: dict[str, Any],
    length: int,
    flags: Sequence[str],
    documents: Sequence[Sequence[int]] | None = None,
) -> tuple[dict[str, Tensor], set[str]]:
    """A forward and a backward of the model, with full weights drawn the same everywhere.

    Args:
        documents: for each of the two sequences, the lengths of its documents.
    Returns: `logits` and canonical names to gradients; the types of the modules.
    """
    from megatron.core.transformer.module import Float16Module

    from megatron_trinity.model.documents import Documents
    from megatron_trinity.model.shards import whole_tensors

    config = afmoe_config(**overrides)
    model = build(parse(config, flags))
    if "--bf16" in flags:
        model = Float16Module(model.config, model)
    module = getattr(model, "module", model)
    load_whole_tensors(module, _random(whole_tensors(module), "--bf16" in flags))

    packed = None
    if documents is not None:
        cumulative = torch.zeros(BATCH, length + 1, dtype=torch.int32)
        for row, lengths in zip(cumulative, documents, strict=True):
            row[1:] = length
            row[1 : len(lengths) + 1] = torch.tensor(lengths).cumsum(0)
        packed = Documents.from_cu_seqlens(cumulative, length)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(config.vocab_size, (BATCH, length), generator=generator)
    positions = torch.arange(length).expand(BATCH, length)
    model.train()
    logits = model(tokens, positions, None, packed_seq_params=packed)
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))
    (logits.float() * cotangent).sum().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            gradient = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
    results = {
        name: tensor
        for name, tensor in whole_tensors(module).items()
        if not name.endswith("expert_bias")
    }
    kinds = {type(part).__name__ for part in module.modules()}
    return {"logits": logits.detach(), **results}, kinds


def _random(tensors: dict[str, Tensor], in_bf16: bool) -> dict[str, Tensor]:
    """Weights, gains and biases; in bf16 such that no choice of experts is a near tie."""
    generator = torch.Generator().manual_seed(4)
    for key in sorted(tensors):
        tensor = tensors[key]
        noise = torch.randn(tensor.shape, generator=generator)
        if key.endswith("expert_bias"):
            spread = torch.randperm(tensor.shape[-1], generator=generator) - tensor.shape[-1] / 2
            tensors[key] = 0.3 * spread.expand_as(tensor) if in_bf16 else 0.2 * noise
        elif "norm" in key:
            tensors[key] = 1 + 0.2 * noise
        else:
            tensors[key] = (0.02 if in_bf16 else 0.1) * noise
    return tensors


def distances(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor, relative to its norm; less than what rounding leaves of all together."""
    assert got.keys() == expected.keys()
    total = torch.stack([t.float().norm() for n, t in expected.items() if n != "logits"]).norm()
    result = {}
    for name, tensor in expected.items():
        error = (got[name].float() - tensor.float()).norm() - 1e-7 * total
        result[name] = float(error / tensor.float().norm()) if error > 0 else 0.0
    return result
