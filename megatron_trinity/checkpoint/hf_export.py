"""A Megatron checkpoint as an AfMoE directory of Hugging Face."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_trinity.checkpoint.hf_config import config_json, hf_config_from_args
from megatron_trinity.checkpoint.hf_mapping import entries, hf_tensors
from megatron_trinity.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_trinity.data.manifest import refuse_existing, staging_directory
from megatron_trinity.errors import TrinityError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_hf(
    load: Path,
    hf: Path,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> int:
    """Write the directory `hf` from the checkpoint `load`; it appears whole or not at all.

    Args:
        load: checkpoint directory of any layout.
        hf: directory to write.
        dtype: `fp32` or `bf16`, by default the one that the run trained in. Norm gains and expert
            biases are always fp32.
        tokenizer: directory to take the tokenizer from, by default the one that the run used.
        shard_bytes: size at which a new safetensors file is begun.
        overwrite: replace what is there.
    Returns: bytes of tensors written.

    Raises:
        TrinityError: a tensor is missing, left over or not finite, or a path is not usable.
    """
    checkpoint = TorchDistCheckpoint(load)
    args = checkpoint.args
    dtype = dtype or ("bf16" if args.bf16 else "fp32")
    tokenizer_dir = tokenizer or (Path(args.tokenizer_model) if args.tokenizer_model else None)
    if not overwrite:
        refuse_existing([hf], "is not replaced")
    with staging_directory(hf.parent, hf.name) as staging:
        whole = staging / hf.name
        whole.mkdir()
        written = _write_weights(_converted(checkpoint, DTYPES[dtype]), whole, shard_bytes)
        _write_configs(args, dtype, whole, tokenizer_dir)
        if hf.exists():
            hf.rename(staging / "replaced")
        whole.rename(hf)
    return written


def _converted(checkpoint: TorchDistCheckpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor of the checkpoint, one Trinity tensor in memory at a time."""
    config = hf_config_from_args(checkpoint.args)
    left = set(checkpoint.model_keys())
    for entry in entries(config):
        whole = checkpoint.tensor(entry.trinity)
        left.discard(entry.trinity)
        for name, tensor in hf_tensors(entry, whole, config):
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise TrinityError(f"{name} has {bad} values that are not finite")
            keeps_fp32 = tensor.ndim == 1
            yield name, tensor.to(torch.float32 if keeps_fp32 else dtype).contiguous().clone()
    if left:
        raise TrinityError(f"no rule takes {', '.join(sorted(left))} of {checkpoint.path}")


def _write_weights(tensors: Iterator[tuple[str, Tensor]], directory: Path, shard_bytes: int) -> int:
    """Write safetensors files of about `shard_bytes` and their index."""
    shards: list[dict[str, int]] = []  # name to bytes, one mapping a file
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        if pending:
            file = directory / f"part-{len(shards)}"
            save_file(pending, file, metadata={"format": "pt"})
            file.chmod(directory.stat().st_mode & 0o666)  # safetensors lets only the owner read
            shards.append({name: tensor.nbytes for name, tensor in pending.items()})
            pending.clear()

    for name, tensor in tensors:
        if sum(t.nbytes for t in pending.values()) + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor
    flush()
    total = sum(sum(shard.values()) for shard in shards)
    if len(shards) == 1:
        (directory / "part-0").rename(directory / "model.safetensors")
        return total
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"part-{number}").rename(directory / file)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)
    return total


def _write_configs(
    args: Namespace, dtype: str, directory: Path, tokenizer_dir: Path | None
) -> None:
    """Write `config.json`, `generation_config.json` and the tokenizer's files."""
    token_ids: dict[str, int] = {}
    if tokenizer_dir is not None:
        if not (tokenizer_dir / "tokenizer_config.json").is_file():
            raise TrinityError(
                f"{tokenizer_dir} holds no tokenizer; name its directory with --tokenizer"
            )
        for file in TOKENIZER_FILES:
            if (tokenizer_dir / file).is_file():
                shutil.copyfile(tokenizer_dir / file, directory / file)
        token_ids = _special_token_ids(tokenizer_dir)
    config = hf_config_from_args(args)
    torch_dtype = str(DTYPES[dtype]).removeprefix("torch.")
    _write_json(directory / "config.json", {**config_json(config, torch_dtype), **token_ids})
    _write_json(directory / "generation_config.json", {"_from_model_config": True, **token_ids})


def _special_token_ids(tokenizer_dir: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return {name: number for name, number in ids.items() if number is not None}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
