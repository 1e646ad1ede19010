"""Reading a Megatron `torch_dist` checkpoint without building its model, on one process."""

from __future__ import annotations

import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_trinity.errors import TrinityError, root_cause

TRACKER = "latest_checkpointed_iteration.txt"
OPTIMIZER_PREFIX = "optimizer."
MOMENTUM = ".expert_bias_momentum"
READ_ERRORS = (Exception, CheckpointException)
"""Many kinds, from torch, pickle and the file system; torch's own is no subclass of Exception."""


class TorchDistCheckpoint:
    """One iteration of a checkpoint directory.

    Attributes:
        path: the iteration's own directory.
        args: the arguments that the run had.
        iteration: optimizer steps that the run had taken.
        has_momentum: whether it holds SMEBU's momentum, which is state of training alone.
    """

    def __init__(self, directory: Path | str) -> None:
        """Open the newest iteration of `directory`, or `directory` itself if it is an iteration.

        Raises:
            TrinityError: there is no checkpoint of a Trinity model, or it cannot be read.
        """
        from megatron.core import dist_checkpointing

        self.path = find_iteration(Path(directory))
        self._reader = FileSystemReader(self.path)
        try:
            stored = self._reader.read_metadata().state_dict_metadata
            common: dict[str, Any] = _quietly(
                dist_checkpointing.load_common_state_dict, str(self.path)
            )
        except READ_ERRORS as error:
            raise TrinityError(
                f"{self.path} cannot be read as a checkpoint: {root_cause(error)}"
            ) from error
        self.args: Namespace = common["args"]
        self.iteration: int = common["iteration"]
        if not hasattr(self.args, "num_dense_layers"):
            raise TrinityError(f"{self.path} is a checkpoint of another model, not of Trinity")
        tensors = {
            key: entry
            for key, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(OPTIMIZER_PREFIX)
        }
        self.has_momentum = any(key.endswith(MOMENTUM) for key in tensors)
        self._stored = {key: tensors[key] for key in tensors if not key.endswith(MOMENTUM)}

    def model_keys(self) -> list[str]:
        """Canonical names of the model's tensors, sorted."""
        return sorted(self._stored)

    def tensor(self, key: str) -> Tensor:
        """Read one whole tensor of the model; only the files that hold parts of it are touched.

        Raises:
            TrinityError: the checkpoint has no such tensor, or its file cannot be read.
        """
        if key not in self._stored:
            raise TrinityError(f"{self.path} has no tensor {key}")
        entry = self._stored[key]
        state = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        try:
            _quietly(
                load,
                state,
                storage_reader=self._reader,
                planner=DefaultLoadPlanner(allow_partial_load=False),
                no_dist=True,
            )
        except READ_ERRORS as error:
            raise TrinityError(f"{self.path}: {key} cannot be read: {root_cause(error)}") from error
        return state[key]


def find_iteration(directory: Path) -> Path:
    """The directory of the newest iteration that the pointer file of `directory` names.

    Raises:
        TrinityError: there is none.
    """
    if (directory / ".metadata").is_file():
        return directory
    try:
        name = (directory / TRACKER).read_text().strip()
    except OSError as error:
        raise TrinityError(f"{directory} holds no checkpoint: {TRACKER} is not there") from error
    iteration = directory / (f"iter_{int(name):07d}" if name.isdigit() else name)
    if not (iteration / ".metadata").is_file():
        raise TrinityError(f"{directory / TRACKER} names {name}, but {iteration} is not whole")
    return iteration


def _quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        # One process is what is wanted here.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        return function(*args, **kwargs)
