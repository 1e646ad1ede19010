"""What a checkpoint in Megatron's `torch` format, a file a rank, says of the run that saved it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from zipfile import is_zipfile

from megatron_trinity.checkpoint.torch_dist.read import (
    MOMENTUM,
    READ_ERRORS,
    refuse_other_models,
    unreadable,
)
from megatron_trinity.upstream.checkpoint_pickles import load_object

FOLDERS, MODEL_FILE = "mp_rank_*", "model_optim_rng.pt"


def rank_files(iteration: Path) -> list[Path]:
    """The file of each model-parallel rank, sorted; none in an iteration of another format."""
    return [folder / MODEL_FILE for folder in sorted(iteration.glob(FOLDERS))]


def incomplete_rank_file(iteration: Path) -> str | None:
    """A file of a rank that is missing or cut off, as far as its own table of contents says."""
    for path in rank_files(iteration):
        if not is_zipfile(path):
            return f"{path.relative_to(iteration)} is missing or cut off"
    return None


class RankCheckpoint:
    """One iteration; no tensor is read.

    Attributes:
        path: its directory.
        args: the arguments that the run had.
        has_optimizer: whether it holds state of an optimizer.
        has_momentum: whether it holds SMEBU's momentum.
    """

    def __init__(self, path: Path) -> None:
        """Look into the files of all ranks.

        Raises:
            TrinityError: it is no checkpoint of a Trinity model, or it cannot be read.
        """
        self.path = path
        try:
            states = [load_object(file, mmap=True) for file in rank_files(path)]
            self.args: Namespace = states[0]["args"]
            models = [
                model for state in states for key, model in state.items() if key.startswith("model")
            ]
            names = [name for model in models for name in model]
        except READ_ERRORS as error:
            raise unreadable(path, error) from error
        self.has_optimizer = all("optimizer" in state for state in states)
        self.has_momentum = any(name.endswith(MOMENTUM) for name in names)
        refuse_other_models(path, self.args)
