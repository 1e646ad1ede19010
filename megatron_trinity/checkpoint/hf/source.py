"""An AfMoE directory of Hugging Face, read and checked without touching a value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AfmoeConfig

from megatron_trinity.checkpoint.hf.mapping import (
    Entry,
    check_names,
    check_shape,
    entries,
    expert_format,
    prove_bijection,
)
from megatron_trinity.checkpoint.hf.safetensors_files import (
    DTYPES,
    StoredTensor,
    parse_json,
    read_header,
)
from megatron_trinity.errors import TrinityError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
EXPECTED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0,
    "hidden_act": "silu",
    "n_group": 1,
    "num_expert_groups": 1,
    "num_limited_groups": 1,
    "quantization_config": None,
    "rope_scaling": None,
    "route_norm": True,
    "score_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
}
"""Keys of `config.json` that may be absent, and the one value that a Trinity model agrees with."""


@dataclass(frozen=True)
class HfDirectory:
    """A directory that was found to be one whole AfMoE model.

    Attributes:
        path: the directory.
        config: its configuration.
        table: the mapping of its tensors, a proved bijection.
        tensors: name to place of every tensor; empty if there is an index alone.
        dtype: of its matrices; None if there is an index alone.
    """

    path: Path
    config: AfmoeConfig
    table: tuple[Entry, ...]
    tensors: dict[str, StoredTensor]
    dtype: torch.dtype | None


def open_hf_directory(path: Path, names_suffice: bool = False) -> HfDirectory:
    """Read what is in a directory, and check that it is one whole model.

    Args:
        names_suffice: be content with an index of which no file is there.

    Raises:
        TrinityError: it is not; in one line that names the tensor or the file.
    """
    if not path.is_dir():
        raise TrinityError(f"{path} is no directory")
    _refuse_pickles(path)
    config = read_config(path)
    weight_map = _read_index(path)
    files = _files(weight_map)
    if names_suffice and weight_map and not any((path / file).exists() for file in files):
        return HfDirectory(path, config, _table(config, list(weight_map)), {}, None)
    _refuse_other_files(path, files)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(inside(path, file)).items():
            if name in tensors:
                raise TrinityError(f"{name} is in {tensors[name].file.name} and in {file}")
            if weight_map is not None and name not in weight_map:
                raise TrinityError(f"{path / file} has {name}, which {INDEX} does not name")
            tensors[name] = tensor
    for name, file in (weight_map or {}).items():
        if name not in tensors or tensors[name].file.name != file:
            raise TrinityError(f"{path / file} lacks {name}, which {INDEX} says is in it")
    table = _table(config, list(tensors))
    for entry in table:
        for name, shape in entry.hf.items():
            check_shape(name, tensors[name].shape, shape)
    return HfDirectory(path, config, table, tensors, _dtype_of_matrices(table, tensors))


def files_of(path: Path) -> list[str]:
    """Names of the safetensors files that are the model in a directory, whether they are there.

    Raises:
        TrinityError: the index does not say.
    """
    return _files(_read_index(path))


def read_config(path: Path) -> AfmoeConfig:
    """The configuration in a directory.

    Raises:
        TrinityError: there is none, it is not AfMoE's, or a Trinity model cannot be like that.
    """
    file = inside(path, "config.json")
    said = parse_json(file)
    if not isinstance(said, dict) or said.get("model_type") != "afmoe":
        raise TrinityError(f"{file} is not of an AfMoE model")
    for key, only in EXPECTED.items():
        if said.get(key, only) != only:
            raise TrinityError(f"{file} has {key} {said[key]!r}; Trinity models have {only!r}")
    try:
        config = AfmoeConfig.from_dict(said)
    except Exception as error:  # of transformers' own validation: of many kinds
        raise TrinityError(f"{file}: {' '.join(str(error).split())}") from error
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" or rope["rope_theta"] % 1:
        raise TrinityError(f"{file} has rope_parameters {rope}; Trinity models have plain RoPE")
    every = config.global_attn_every_n_layers
    expected = [
        "sliding_attention" if layer % every else "full_attention"
        for layer in range(1, config.num_hidden_layers + 1)
    ]
    if list(config.layer_types) != expected:
        raise TrinityError(
            f"{file} has layer_types that do not follow from global_attn_every_n_layers {every}"
        )
    return config


def inside(directory: Path, name: str) -> Path:
    """The file `name` of `directory`; a link, as the Hub's cache has them, is read through.

    Raises:
        TrinityError: it is not there, or the name is none of a file in that very directory.
    """
    file = directory / name
    if Path(name).name != name:
        raise TrinityError(f"{file} leads out of {directory}")
    if not file.is_file():
        raise TrinityError(f"{file} is missing")
    return file


def _refuse_pickles(path: Path) -> None:
    for pattern in PICKLES:
        for file in sorted(path.glob(pattern)):
            raise TrinityError(
                f"{file} is a pickle, which can run code when it is read; save the model as "
                "safetensors, or take the file away if it is no part of it"
            )


def _refuse_other_files(path: Path, files: list[str]) -> None:
    for file in sorted(path.glob("*.safetensors")):
        if file.name not in files:
            raise TrinityError(f"{file} is no part of the model that {INDEX} describes")


def _read_index(path: Path) -> dict[str, str] | None:
    """Name to file, or None where one file is the whole model."""
    if not (path / INDEX).exists():
        return None
    if (path / SINGLE).exists():
        raise TrinityError(f"{path} has {SINGLE} and {INDEX}; remove the one that is not the model")
    content = parse_json(inside(path, INDEX))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise TrinityError(f"{path / INDEX} has no weight_map of tensors to files")
    return weight_map


def _files(weight_map: dict[str, str] | None) -> list[str]:
    return [SINGLE] if weight_map is None else sorted(set(weight_map.values()))


def _table(config: AfmoeConfig, names: list[str]) -> tuple[Entry, ...]:
    table = tuple(entries(config, expert_format(names)))
    check_names(names, table)
    prove_bijection(table)
    return table


def _dtype_of_matrices(
    table: tuple[Entry, ...], tensors: dict[str, StoredTensor]
) -> torch.dtype | None:
    """The one type of all matrices. Vectors, which become fp32, may be of any that is known."""
    first: str | None = None
    for entry in table:
        for name, shape in entry.hf.items():
            dtype = tensors[name].dtype
            if dtype not in DTYPES:
                raise TrinityError(
                    f"{name} is of type {dtype}; only {', '.join(DTYPES)} are converted"
                )
            if len(shape) > 1:
                first = first or name
                if dtype != tensors[first].dtype:
                    raise TrinityError(
                        f"{name} is of type {dtype} and {first} of type {tensors[first].dtype}; "
                        "matrices are to be of one type"
                    )
    return DTYPES[tensors[first].dtype] if first else None
