"""AfMoE directories of Hugging Face with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AfmoeConfig

from megatron_trinity.checkpoint.hf.config import config_json
from megatron_trinity.checkpoint.hf.mapping import (
    Experts,
    check_names,
    check_shape,
    entries,
    expert_format,
)

INDEX = "model.safetensors.index.json"


def random_tensors(
    config: AfmoeConfig, dtype: torch.dtype, experts: Experts = "per-expert"
) -> dict[str, Tensor]:
    """Every tensor of a model: matrices of `dtype`, vectors in fp32."""
    generator = torch.Generator().manual_seed(config.vocab_size)
    tensors = {}
    for entry in entries(config, experts):
        for name, shape in entry.hf.items():
            noise = torch.randn(shape, generator=generator)
            if "norm" in name:
                tensors[name] = 1 + 0.2 * noise
            elif len(shape) == 1:
                tensors[name] = 0.2 * noise
            else:
                tensors[name] = (0.05 * noise).to(dtype)
    return tensors


def write_afmoe(
    path: Path, config: AfmoeConfig, tensors: dict[str, Tensor], files: int = 1
) -> Path:
    """Write a directory of so many safetensors files."""
    path.mkdir(parents=True)
    dtype = "bfloat16" if tensors["lm_head.weight"].dtype == torch.bfloat16 else "float32"
    (path / "config.json").write_text(json.dumps(config_json(config, dtype)))
    if files == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = dict(list(tensors.items())[number::files])
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def dequantized(tensors: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    """The tensors of a model in FP8 in fp32: each scale, named so, spread over its block."""
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith(suffix):
            continue
        plain[name] = tensor.float()
        scale = tensors.get(name + suffix)
        if scale is not None:
            for axis, size in enumerate(tensor.shape):
                scale = scale.repeat_interleave(size // scale.shape[axis], axis)
            plain[name] *= scale.float()
    return plain


def to_trinity(hf: Mapping[str, Tensor], config: AfmoeConfig) -> dict[str, Tensor]:
    """Convert a whole state dict in memory, with experts in either form.

    Raises:
        TrinityError: a tensor is missing, left over, or of another shape.
    """
    source = {name: tensor for name, tensor in hf.items() if tensor.numel()}
    table = list(entries(config, expert_format(source)))
    check_names(source, table)
    converted = {}
    for entry in table:
        for name, shape in entry.hf.items():
            check_shape(name, tuple(source[name].shape), shape)
        whole = torch.empty(entry.shape, dtype=source[entry.pieces[0].hf].dtype)
        for piece in entry.pieces:
            rows_of(whole, piece.row, piece.rows).copy_(
                rows_of(source[piece.hf], piece.hf_row, piece.rows)
            )
        converted[entry.trinity] = whole
    return converted


def rows_of(tensor: Tensor, row: int, rows: int) -> Tensor:
    """Rows of a tensor, counted over all axes but the last."""
    return tensor.detach().reshape(-1, tensor.shape[-1])[row : row + rows]
