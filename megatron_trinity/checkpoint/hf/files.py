"""What stands beside the weights: configurations, tokenizer and chat template."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_trinity.checkpoint.hf.config import config_json, hf_config_from_args
from megatron_trinity.checkpoint.hf.safetensors_files import parse_json
from megatron_trinity.checkpoint.hf.source import inside
from megatron_trinity.errors import TrinityError

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def carry_over(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat template and `generation_config.json`; returns the names of the files.

    What links lead to is copied, not the links.

    Raises:
        TrinityError: one is a link that leads nowhere.
    """
    files = files_to_carry(source)
    for file in files:
        shutil.copyfile(file, target / file.name)
    return [file.name for file in files]


def files_to_carry(source: Path) -> list[Path]:
    """The files that `carry_over` copies.

    Raises:
        TrinityError: one is a link that leads nowhere.
    """
    names = (*TOKENIZER_FILES, GENERATION_CONFIG)
    return [inside(source, name) for name in names if os.path.lexists(source / name)]


def write_configs(
    args: Namespace,
    torch_dtype: str,
    directory: Path,
    tokenizer_dir: Path | None,
    quantization: dict[str, Any] | None = None,
) -> None:
    """Write `config.json`, `generation_config.json` and the tokenizer's files.

    Args:
        args: of the run.
        torch_dtype: type of the matrices, as torch names it.
        tokenizer_dir: where the run has its tokenizer.
        quantization: what to say of it in `config.json`, if anything.

    Raises:
        TrinityError: `tokenizer_dir` has no tokenizer.
    """
    generation: dict[str, Any] = {"_from_model_config": True}
    if tokenizer_dir is not None:
        if not carry_over(tokenizer_dir, directory):
            raise TrinityError(
                f"{tokenizer_dir} holds no tokenizer; name its directory with --tokenizer"
            )
        if (directory / TOKENIZER_CONFIG).is_file():
            generation |= _special_token_ids(directory)
        if (directory / GENERATION_CONFIG).is_file():
            generation = parse_json(directory / GENERATION_CONFIG)
    token_ids = {name: generation[name] for name in TOKEN_IDS if name in generation}
    config = config_json(hf_config_from_args(args), torch_dtype)
    if quantization is not None:
        config["quantization_config"] = quantization
    write_json(directory / "config.json", {**config, **token_ids})
    if not (directory / GENERATION_CONFIG).is_file():
        write_json(directory / GENERATION_CONFIG, generation)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file for people to read."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _special_token_ids(tokenizer_dir: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    ids = {name: getattr(tokenizer, name) for name in TOKEN_IDS}
    return {name: number for name, number in ids.items() if number is not None}
