"""The steps of Megatron's training loop without the loop, for what measures them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.core.utils import get_model_config
from megatron.training import get_timers, training


class Steps:
    """A model, its optimizer, and the steps that the loop takes with them.

    Attributes:
        args: Megatron's; `curr_iteration` is of the step that is under way or was the last.
        model: the chunks of this rank, wrapped.
        taken: steps so far.
    """

    def __init__(self, args: Namespace, container: Any, forward_step: Callable[..., Any]) -> None:
        """Args: container: Megatron's configuration of a run; forward_step: as Megatron's loop has
        it, `forward_step(data_iterator, model)`."""
        self.args, self._forward_step, self.taken = args, forward_step, 0
        self.model, self.optimizer, self._scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=container,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        self._schedule = get_forward_backward_func()
        self.config = get_model_config(self.model[0])
        # What the loop puts into it before its first step.
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.timers = get_timers()
        self.config.finalize_model_grads_func = finalize_model_grads
        for chunk in self.model:
            chunk.train()

    def step(self, batch: Mapping[str, Any]) -> tuple[Any, ...]:
        """One step on a micro-batch; what Megatron's `train_step` returns, the losses first."""
        self.args.curr_iteration = self.taken
        self.taken += 1
        result: tuple[Any, ...] = training.train_step(
            self._forward_step,
            RerunDataIterator(iter([batch])),
            self.model,
            self.optimizer,
            self._scheduler,
            self.config,
            self._schedule,
            iteration=self.args.curr_iteration,
        )
        return result
