"""What Megatron's training loop calls after every step, and more values in its log."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from megatron_trinity.upstream.gradient_checks import reading_for
from megatron_trinity.upstream.registry import Adaptation
from megatron_trinity.upstream.rejected_steps import StepRejected, calling_on_rerun
from megatron_trinity.upstream.validation_samples import EvaluatedSet, current_set

ADAPTATION = Adaptation(
    name="training-hooks",
    symbols=(
        "megatron.training.training.train_step",
        "megatron.training.training.training_log",
        "megatron.training.training.evaluate",
        "megatron.training.training.checkpoint_and_decide_exit",
        "megatron.training.training.save_checkpoint_and_time",
        "megatron.training.ft_integration.on_eval_step_end",
        "megatron.core.timers.Timer.elapsed",
    ),
    reason=(
        "the loop has no hook behind an optimizer step, where it is known whether the step was "
        "applied, none before it, where it can still be left out, and none behind an evaluation; "
        "`training_log` prints and writes only what the loss function reported, and waits for the "
        "device and the other ranks for numbers of the host. The loop gathers from all ranks "
        "behind each step whether a signal came, of one kind, with a wait of the host, and not "
        "during an evaluation"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="the loop takes callbacks, and metrics from the outside",
    after=("log-line", "validation-samples"),
)


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step.

    Attributes:
        applied: whether the weights have changed; the same on every rank.
        norm: of the gradients before clipping; None where a loss scale was to blame.
        losses: over the global batch, on ranks of the last pipeline stage.
        rejected: by the rerun machine, before anything was applied.
    """

    applied: bool
    norm: float | None
    losses: Mapping[str, torch.Tensor]
    rejected: StepRejected | None = None


class TrainingHooks(Protocol):
    """What the training loop calls, on every rank."""

    def step_begins(self, optimizer: Any) -> None:
        """Before each step."""

    def gradients_ready(self, optimizer: Any) -> None:
        """When a step's gradients are known, and before anything is applied."""

    def step_restarted(self, model: Sequence[Any]) -> None:
        """Before a step is run again, which takes the same samples as the first time."""

    def step_ended(self, model: Sequence[Any], optimizer: Any, outcome: StepOutcome) -> None:
        """After each optimizer step, applied or not.

        `model` has this rank's model chunks; `optimizer` already has the next step's rates, which
        are those that Megatron logs.
        """

    def values(self) -> Mapping[str, float]:
        """Values of the step that has just ended, by their names in the log.

        They take the place of losses of the same names, which the log would read from the device.
        """

    def log_written(self, logged: Mapping[str, float]) -> None:
        """Told when Megatron has logged the step, and started its interval timer anew if due.

        `logged` is what the log knows of the step beside its losses, by the names in TensorBoard.
        """

    def saved(self, iteration: int, seconds: float) -> None:
        """After a save, for which training stood still so long."""

    def ends_evaluation(self) -> bool:
        """After each batch of an evaluation: whether it ends here; the same on every rank."""

    def leaves(self, iteration: int, saved: bool, save: Callable[[], None]) -> bool:
        """When a step and all that was due behind it is done: whether the loop ends here.

        `saved` is whether that was a save, and `save` saves.
        """

    def evaluated(
        self, losses: Mapping[str, torch.Tensor], of_set: EvaluatedSet, seconds: float
    ) -> None:
        """After an evaluation of one set, with its losses and how long it took.

        There are no losses on ranks without a loss.
        """


_hooks: TrainingHooks | None = None


def set_training_hooks(hooks: TrainingHooks | None) -> None:
    """Call `hooks` from now on, or nothing, in the place of those that were set before.

    Values are averaged over the steps between two log lines, as losses are. Ranks that know no loss
    (all but those of the last pipeline stage) log nothing, as before.
    """
    global _hooks
    _hooks = hooks


def install() -> None:
    """Make the loop call what `set_training_hooks` has set, if anything."""
    from megatron.training import training

    training.train_step = _with_hook(training.train_step)
    training.training_log = _with_values(training.training_log)
    training.evaluate = _with_losses(training.evaluate)
    training.save_checkpoint_and_time = _noting(training.save_checkpoint_and_time)
    training.checkpoint_and_decide_exit = _leaving(training)
    training.ft_integration.on_eval_step_end = _asking(training.ft_integration.on_eval_step_end)


def _with_hook(train_step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(train_step)
    def step_then_hook(
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        optimizer: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        call = (forward_step_func, data_iterator, model, optimizer, *args)
        if _hooks is None:
            return train_step(*call, **kwargs)
        _hooks.step_begins(optimizer)
        rejected = None
        ready = partial(_hooks.gradients_ready, optimizer)
        again = partial(_hooks.step_restarted, model)
        with reading_for(optimizer), calling_on_rerun(again), _before(optimizer, ready):
            try:
                result = train_step(*call, **kwargs)
            except StepRejected as rejection:
                rejected = rejection
                result = ({}, 1, False, False, 0, None, None, 0)
        losses, skipped, *_, norm, _, _ = result
        _hooks.step_ended(model, optimizer, StepOutcome(not skipped, norm, losses, rejected))
        return result

    return step_then_hook


@contextmanager
def _before(optimizer: Any, ready: Callable[[], None]) -> Iterator[None]:
    """Meanwhile call `ready` before each step of the optimizer."""
    step, of_instance = optimizer.step, vars(optimizer).get("step")

    def ready_then_step() -> Any:
        ready()
        return step()

    optimizer.step = ready_then_step
    try:
        yield
    finally:
        del optimizer.step
        if of_instance is not None:  # somebody else's, as of what counts its operations
            optimizer.step = of_instance


def _with_values(training_log: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(training_log)
    def log_with_values(
        loss_dict: dict[str, Any], total_loss_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if _hooks is None:
            return training_log(loss_dict, total_loss_dict, *args, **kwargs)
        values = _hooks.values()
        if not loss_dict:
            values = {}
        tensors = {name: torch.tensor([v], dtype=torch.float32) for name, v in values.items()}
        # Where all of them are on the host, so are their sums, and the step has ended.
        with nullcontext() if loss_dict.keys() - tensors.keys() else _nothing_to_wait_for():
            result = training_log({**loss_dict, **tensors}, total_loss_dict, *args, **kwargs)
        _hooks.log_written(_numbers(args))
        return result

    return log_with_values


_LOGGED = (
    *("learning-rate", "iteration", "loss-scale", "memory", "skipped"),
    *("grad-norm", "params-norm", "num-zeros"),
)
"""Arguments of `training_log` behind the losses, by their names in TensorBoard."""


def _numbers(args: Sequence[Any]) -> dict[str, float]:
    given = dict(zip(_LOGGED, args, strict=False))
    of_step = {name: given.get(name) for name in _LOGGED if "-" in name}
    return {name: float(v) for name, v in of_step.items() if isinstance(v, int | float)}


class _NumbersOnHost(TorchFunctionMode):
    """`torch.tensor` leaves numbers on the host: the zeros that the log begins its sums with."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") == "tensor":
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        return function(*args, **kwargs)


@contextmanager
def _nothing_to_wait_for() -> Iterator[None]:
    """The log neither sends numbers to the device nor asks whether it, or a rank, is ready."""
    from megatron.core.timers import Timer

    with mock.patch.object(Timer, "elapsed", _elapsed), _NumbersOnHost():
        yield


def _elapsed(timer: Any, reset: bool = True, barrier: bool = False) -> float:
    """As `Timer.elapsed`, for a step whose values have been read."""
    now = time.time()
    if timer._started:
        timer._elapsed += now - timer._start_time
        timer._active_time += now - timer._start_time
        timer._start_time = now
    elapsed: float = timer._elapsed
    if reset:
        timer._elapsed = 0.0
    return elapsed


class _EvaluationEnds(Exception):
    """On every rank, between two batches."""


def _with_losses(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    @functools.wraps(evaluate)
    def evaluate_then_hook(*args: Any, **kwargs: Any) -> Any:
        mode = get_rerun_state_machine().get_mode()
        began = time.monotonic()
        try:
            with _without_duration():
                losses, collected, out_of_time = evaluate(*args, **kwargs)
        except _EvaluationEnds:
            get_rerun_state_machine().set_mode(mode)
            return None, None, True
        if _hooks is not None and not out_of_time:
            _hooks.evaluated(losses, current_set(), time.monotonic() - began)
        return losses, collected, out_of_time

    return evaluate_then_hook


def _asking(original: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(original)
    def on_eval_step_end() -> None:
        original()
        if _hooks is not None and _hooks.ends_evaluation():
            raise _EvaluationEnds

    return on_eval_step_end


_newest_save = -1
"""Iteration of the newest save of this process."""


def _noting(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def save_checkpoint_and_time(iteration: int, *args: Any, **kwargs: Any) -> Any:
        global _newest_save
        began = time.monotonic()
        result = save(iteration, *args, **kwargs)
        _newest_save = iteration
        if _hooks is not None:
            _hooks.saved(iteration, time.monotonic() - began)
        return result

    return save_checkpoint_and_time


def _leaving(training: Any) -> Callable[..., bool]:
    decide = training.checkpoint_and_decide_exit

    @functools.wraps(decide)
    def checkpoint_and_decide_exit(
        model: Any, optimizer: Any, scheduler: Any, iteration: int, flops: Any, *context: Any
    ) -> bool:
        global _newest_save
        _newest_save = -1
        call = (model, optimizer, scheduler, iteration, flops, *context)
        with _without_duration():
            leaves: bool = decide(*call)
        if leaves or _hooks is None:
            return leaves
        checkpointing, data = context

        def save() -> None:
            training.save_checkpoint_and_time(
                *(iteration, model, optimizer, scheduler, flops, checkpointing),
                train_data_iterator=data,
            )

        return _hooks.leaves(iteration, _newest_save == iteration, save)

    return checkpoint_and_decide_exit


@contextmanager
def _without_duration() -> Iterator[None]:
    """Hide `--exit-duration-in-mins` from Megatron, which would exchange it behind each step."""
    from megatron.training import get_args

    options = get_args()
    minutes = options.exit_duration_in_mins
    options.exit_duration_in_mins = None if _hooks is not None else minutes
    try:
        yield
    finally:
        options.exit_duration_in_mins = minutes
