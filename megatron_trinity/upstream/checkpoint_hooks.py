"""What is called around saving and loading a checkpoint."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_trinity.upstream.checkpoint_tracker import TRACKER, call_around_pointer
from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="checkpoint-hooks",
    symbols=(
        "megatron.training.training.save_checkpoint",
        "megatron.training.training.load_checkpoint",
        "megatron.training.checkpointing.get_checkpoint_tracker_filename",
    ),
    reason=(
        "Megatron writes a checkpoint into whatever is left of an earlier one, moves the pointer "
        "with nothing that says later whether all files are there, starts a save while the one "
        "before is being written, and loads what the pointer names"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="checkpointing takes callbacks around a save and a load",
    after=("checkpoint-failures",),
)


class CheckpointHooks(Protocol):
    """What saving and loading call. A directory is that of one iteration."""

    def check_values(self, model: Sequence[Any], optimizer: Any, directory: Path) -> None:
        """On every rank, before a save; no other one is in progress."""

    def before_save(self, directory: Path) -> None:
        """On rank 0, before any rank writes; no other save is in progress."""

    def before_pointer(self, directory: Path) -> None:
        """On rank 0, when all files are written and before the pointer names them."""

    def after_pointer(self, directory: Path) -> None:
        """On rank 0, when the pointer names `directory`."""

    def choose(self) -> Path | None:
        """On every rank, before loading: what to load, the same on all; None for a new run."""

    def loaded(self, model: Sequence[Any], optimizer: Any, directory: Path) -> None:
        """On every rank, when the values of `directory` are in the model and its optimizer."""


_hooks: CheckpointHooks | None = None


def set_checkpoint_hooks(hooks: CheckpointHooks) -> None:
    """Call `hooks` from now on, in the place of those that were set before."""
    global _hooks
    _hooks = hooks
    call_around_pointer(hooks.before_pointer, hooks.after_pointer)


def install() -> None:
    """Wrap the two functions where the training loop calls them."""
    from megatron.training import training

    training.save_checkpoint = _saving(training.save_checkpoint)
    training.load_checkpoint = _loading(training.load_checkpoint)


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_checkpoint(
        iteration: int, model: Any, optimizer: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from megatron.training import get_args, training

        if _hooks is not None:
            # One at a time: this one may be of the same iteration.
            training.maybe_finalize_async_save(blocking=True)
            directory = Path(get_args().save, f"iter_{iteration:07d}")
            _hooks.check_values(model, optimizer, directory)
            if torch.distributed.get_rank() == 0:
                _hooks.before_save(directory)
            torch.distributed.barrier()
        return original(iteration, model, optimizer, *args, **kwargs)

    return save_checkpoint


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_checkpoint(model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = _hooks.choose() if _hooks is not None else None
        if _hooks is None or chosen is None:
            return original(model, optimizer, *args, **kwargs)
        with _pointing_at(chosen):
            result = original(model, optimizer, *args, **kwargs)
        _hooks.loaded(model, optimizer, chosen)
        return result

    return load_checkpoint


@contextmanager
def _pointing_at(iteration: Path) -> Iterator[None]:
    """Let Megatron read a pointer that names `iteration`, whatever the one beside it says."""
    from megatron.training import checkpointing

    original = checkpointing.get_checkpoint_tracker_filename
    with tempfile.TemporaryDirectory() as folder:
        pointer = Path(folder, TRACKER)
        pointer.write_text(iteration.name.removeprefix("iter_"))

        def tracker_filename(directory: str) -> str:
            found = Path(directory) == iteration.parent
            return str(pointer) if found else original(directory)

        checkpointing.get_checkpoint_tracker_filename = tracker_filename
        try:
            yield
        finally:
            checkpointing.get_checkpoint_tracker_filename = original
