"""A model and its optimizer, whose training steps are counted by their parts."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import get_timers, training

from megatron_trinity.planning.costs.layers import watch_layers
from megatron_trinity.planning.costs.parts import BEHIND, EMBEDDING, GRADIENTS, HEAD, OPTIMIZER
from megatron_trinity.planning.costs.places import Places
from megatron_trinity.planning.costs.step import Counts, count_step


class Side:
    """A model, its optimizer and the steps that Megatron's loop takes with them."""

    def __init__(self, args: Namespace, container: Any, forward_step: Callable[..., Any]) -> None:
        """Args: container: Megatron's configuration of a run; forward_step: as Megatron's loop has
        it, `forward_step(data_iterator, model)`."""
        self._args = args
        self.model, self._optimizer, self._scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=container,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        self._schedule = get_forward_backward_func()
        self._forward_step = forward_step
        self._totals: dict[str, Any] = {}
        self._places = Places(BEHIND)
        self._config = get_model_config(self.model[0])
        self._config.grad_scale_func = self._optimizer.scale_loss
        self._config.timers = get_timers()
        self._config.finalize_model_grads_func = self._within(GRADIENTS, finalize_model_grads)
        for owner, name, part in (
            (self._optimizer, "step", OPTIMIZER),
            (self._optimizer, "zero_grad", GRADIENTS),
            (self.model[0], "zero_grad_buffer", GRADIENTS),
        ):
            setattr(owner, name, self._within(part, getattr(owner, name)))
        # What torch takes on a GPU; on a CPU it goes through the parameters one by one.
        for group in self._optimizer.param_groups:
            group["foreach"] = not group.get("fused")
        self.model[0].train()
        self._inner = unwrap_model(self.model[0])
        self.parts = watch_layers(self._inner, self._places)

    def step(self, batch: Mapping[str, Any], iteration: int) -> None:
        """One step, from 1, with its line in the log where one is due."""
        args = self._args
        args.curr_iteration = iteration - 1
        losses, skipped, _, _, _, norm, zeros, _ = training.train_step(
            self._forward,
            RerunDataIterator(iter([batch])),
            self.model,
            self._optimizer,
            self._scheduler,
            self._config,
            self._schedule,
            iteration=args.curr_iteration,
        )
        rate = self._optimizer.param_groups[0]["lr"]
        training.training_log(
            losses, self._totals, rate, iteration, 1.0, False, skipped, norm, None, zeros, 0
        )
        if skipped:
            raise RuntimeError("a step was not applied, so it is not one to count")

    def counted(self, batch: Mapping[str, Any], iteration: int) -> Counts:
        """The same, counted. The weights stay: what fake ranks gather is no model."""
        weights = list(self._inner.parameters())
        before = [weight.detach().clone() for weight in weights]
        left_out = [*weights, *self._inner.buffers()]
        counts = count_step(lambda: self.step(batch, iteration), self._places, left_out)
        with torch.no_grad():
            torch._foreach_copy_(weights, before)
        return counts

    def _forward(self, *args: Any) -> Any:
        """The forward step and its loss; a micro-batch begins with what is ahead of the layers."""
        self._places.enter(EMBEDDING)
        output, loss = self._forward_step(*args)
        self._places.leave()
        return output, self._within(HEAD, loss)

    def _within(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def labelled(*args: Any, **kwargs: Any) -> Any:
            with self._places.part(part):
                return function(*args, **kwargs)

        return labelled
