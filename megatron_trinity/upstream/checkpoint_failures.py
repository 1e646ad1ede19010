"""A checkpoint that cannot be saved or loaded ends the run with one line that says what to do."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException  # no subclass of Exception

from megatron_trinity.errors import TrinityError, root_cause
from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="checkpoint-failures",
    symbols=(
        "megatron.training.training.save_checkpoint",
        "megatron.training.training.load_checkpoint",
        "megatron.training.training.maybe_finalize_async_save",
    ),
    reason="Megatron lets the errors of many threads, processes and ranks through as tracebacks",
    written_for="megatron-core 0.19.2",
    remove_when="megatron-core's checkpointing raises one kind of error for them",
)


SCHEDULE = "OptimizerParamScheduler:"
"""How the errors of Megatron's learning-rate schedule begin."""

REMEDY = "mend that and start again, the run goes on from the checkpoint before it"

FULL = 64 * 2**20
"""Bytes of free disk under which a failed save is put down to the disk."""


def what_failed(error: BaseException, directory: str) -> str:
    """The cause of a failed save: the disk if it is full, since the writer's errors do not say."""
    free = shutil.disk_usage(directory).free if os.path.isdir(directory) else None
    if free is not None and free < FULL:
        return f"the disk of {directory} is full, {free / 1e6:.1f} MB are free"
    return root_cause(error)


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        try:
            return original(iteration, *args, **kwargs)
        except (Exception, CheckpointException) as error:
            raise TrinityError(
                f"the checkpoint of iteration {iteration} could not be saved: "
                f"{what_failed(error, get_args().save)}; {REMEDY}"
            ) from error

    return save_checkpoint


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        try:
            return original(*args, **kwargs)
        except (Exception, CheckpointException) as error:
            cause = root_cause(error)
            remedy = "name an older one with --ckpt-step"
            if cause.startswith(SCHEDULE):
                cause = f"its schedule differs from this run's ({cause})"
                remedy = "take this run's with --override-opt-param-scheduler"
            place = get_args().load or get_args().pretrained_checkpoint
            raise TrinityError(
                f"the checkpoint under {place} could not be loaded: {cause}; {remedy}"
            ) from error

    return load_checkpoint


def _finalizing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def maybe_finalize_async_save(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        try:
            return original(*args, **kwargs)
        except (Exception, CheckpointException) as error:
            raise TrinityError(
                "a checkpoint could not be saved in the background: "
                f"{what_failed(error, get_args().save)}; {REMEDY}"
            ) from error

    return maybe_finalize_async_save


def install() -> None:
    """Wrap the three functions where the training loop calls them."""
    from megatron.training import training

    training.maybe_finalize_async_save = _finalizing(training.maybe_finalize_async_save)
    training.save_checkpoint = _saving(training.save_checkpoint)
    training.load_checkpoint = _loading(training.load_checkpoint)
