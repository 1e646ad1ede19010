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
    apart: bool = False,
) -> tuple[dict[str, Tensor], set[str]]:
    """A forward and a backward of the model, with full weights drawn the same everywhere.

    Args:
        documents: for each of the two sequences, the lengths of its documents.
        apart: draw weights with which no choice of experts is a near tie, which bf16 could flip.
    Returns: `logits` and canonical names to gradients; the types of the modules.
    """
    from megatron.core.transformer.module import Float16Module

    from megatron_trinity.model.shards import whole_tensors

    config = afmoe_config(**overrides)
    model = build(parse(config, flags))
    if "--bf16" in flags:
        model = Float16Module(model.config, model)
    module = getattr(model, "module", model)
    load_whole_tensors(module, _random(whole_tensors(module), apart))

    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(config.vocab_size, (BATCH, length), generator=generator).to(device)
    positions = torch.arange(length, device=device).expand(BATCH, length)
    model.train()
    logits = model(tokens, positions, None, packed_seq_params=packed(documents, length, device))
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))
    (logits.float() * cotangent.to(device)).sum().backward()
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


def packed(
    documents: Sequence[Sequence[int]] | None, length: int, device: torch.device | None = None
) -> Any:
    """What the model is told of documents of these lengths, a sequence a row."""
    from megatron_trinity.model.documents import Documents

    if documents is None:
        return None
    cumulative = torch.full((len(documents), length + 1), length, dtype=torch.int32)
    for row, lengths in zip(cumulative, documents, strict=True):
        row[: len(lengths) + 1] = torch.tensor([0, *lengths]).cumsum(0)
    return Documents.from_cu_seqlens(cumulative.to(device), length)


def _random(tensors: dict[str, Tensor], apart: bool) -> dict[str, Tensor]:
    """Weights, gains and biases."""
    generator = torch.Generator().manual_seed(4)
    for key in sorted(tensors):
        tensor = tensors[key]
        noise = torch.randn(tensor.shape, generator=generator)
        if key.endswith("expert_bias"):
            spread = torch.randperm(tensor.shape[-1], generator=generator) - tensor.shape[-1] / 2
            tensors[key] = 0.3 * spread.expand_as(tensor) if apart else 0.2 * noise
        elif "norm" in key:
            tensors[key] = 1 + 0.2 * noise
        else:
            tensors[key] = (0.02 if apart else 0.1) * noise
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
