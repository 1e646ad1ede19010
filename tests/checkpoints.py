"""Checkpoints written without a run: tensors of a small Trinity model, in any files and chunks."""

from __future__ import annotations

import itertools
import os
import pickle
import runpy
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_trinity.checkpoint.conversion.slices import slices
from megatron_trinity.checkpoint.hf.mapping import entries
from megatron_trinity.checkpoint.torch_dist.read import COMMON, TorchDistTensors
from megatron_trinity.checkpoint.torch_dist.write import (
    TensorSlice,
    finish,
    object_items,
    plan_files,
    write_file,
)
from megatron_trinity.checkpoint.whole.manifest import (
    faults,
    read_manifest,
    strangers,
    write_manifest,
)
from megatron_trinity.errors import TrinityError
from megatron_trinity.upstream.checkpoint_pickles import load_metadata
from megatron_trinity.upstream.checkpoint_tracker import TRACKER
from tests.trinity import afmoe_config, parse

OPTIMIZER = ("fp32_param", "momentum_buffer")


def model_args(*flags: str) -> Namespace:
    """Arguments of a run of the model below, after two steps of 8 samples."""
    args = parse(afmoe_config(), flags)
    args.consumed_train_samples = 16
    return args


def model_tensors(seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor of the model: matrices of `dtype`, vectors in fp32; and optimizer state."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for entry in entries(afmoe_config()):
        value = torch.randn(entry.shape, generator=generator)
        tensors[entry.trinity] = value if value.ndim == 1 else value.to(dtype)
        if not entry.trinity.endswith("expert_bias"):
            for name in OPTIMIZER:
                state = torch.randn(entry.shape, generator=generator)
                tensors[f"optimizer.state.{name}.{entry.trinity}"] = state
    return tensors


def write_checkpoint(
    run: Path,
    tensors: Mapping[str, Tensor],
    args: Namespace,
    iteration: int = 2,
    files: int = 2,
    max_bytes: int = 10000,
    common: Mapping[str, Any] = {},
    objects: Mapping[str, Any] = {},
) -> Path:
    """An iteration of chunks of at most `max_bytes`, dealt out to files; returns its directory."""
    path = run / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    pieces = [
        TensorSlice(key, tuple(tensor.shape), tensor.dtype, part)
        for key, tensor in tensors.items()
        for part in slices(tuple(tensor.shape), tensor.element_size(), max_bytes)
    ]
    state = {"args": args, "checkpoint_version": 3.0, "iteration": iteration, **common}
    items_of_objects, resolve_objects = object_items({COMMON: state, **objects})

    def resolve(item: Any) -> Tensor:
        chunk = item.tensor_data.chunk
        value = tensors[item.index.fqn]
        for axis, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            value = value.narrow(axis, offset, size)
        return value.contiguous().clone()

    items = [[piece.write_item() for piece in pieces[file::files]] for file in range(files)]
    plans, metadata = plan_files(path, [*items, items_of_objects])
    written = [write_file(path, plan, resolve) for plan in plans[:-1]]
    finish(path, metadata, [*written, write_file(path, plans[-1], resolve_objects)])
    write_manifest(path)
    (run / TRACKER).write_text(str(iteration))
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of an iteration."""
    stored = TorchDistTensors(path)
    return {key: stored.tensor(key) for key in stored.tensor_keys()}


def edit_metadata(path: Path, edit: Callable[[Any], None]) -> None:
    """Change the `.metadata` of an iteration."""
    with open(path / ".metadata", "rb") as stream:
        metadata = load_metadata(stream)
    edit(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def run_tool(tool: str, words: Sequence[object], monkeypatch: Any) -> tuple[int, str]:
    """Run a command line in this process; returns its exit code, and the line of its error."""
    monkeypatch.setattr(sys, "argv", [tool, *map(str, words)])
    main = runpy.run_path(tool)["main"]
    try:
        main()
    except TrinityError as error:
        return error.exit_code, str(error)
    return 0, ""


class Payload:
    """Runs when it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._mark),)


def flip_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def check_whole(directory: Path, checksums: bool) -> None:
    """Refuse a directory that is not what was saved.

    Raises:
        TrinityError: in one line, what is wrong with the first file that is.
    """
    files = read_manifest(directory)
    found = itertools.chain(strangers(directory, files), faults(directory, files, checksums))
    fault = next(found, None)
    if fault is not None:
        raise TrinityError(f"{directory} is not whole: {fault}")
