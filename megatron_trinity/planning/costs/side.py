"""A model and its optimizer, whose training steps are counted by their parts."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import unwrap_model
from megatron.training import training

from megatron_trinity.planning.costs.layers import watch_layers
from megatron_trinity.planning.costs.parts import BEHIND, EMBEDDING, GRADIENTS, HEAD, OPTIMIZER
from megatron_trinity.planning.costs.places import Places
from megatron_trinity.planning.costs.step import Counts, count_step
from megatron_trinity.planning.steps import Steps


class Side(Steps):
    """Steps that say which part of them is under way."""

    def __init__(self, args: Namespace, container: Any, forward_step: Callable[..., Any]) -> None:
        super().__init__(args, container, self._forward)
        self._forward_and_loss = forward_step
        self._totals: dict[str, Any] = {}
        self._places = Places(BEHIND)
        self.config.finalize_model_grads_func = self._within(GRADIENTS, finalize_model_grads)
        for owner, name, part in (
            (self.optimizer, "step", OPTIMIZER),
            (self.optimizer, "zero_grad", GRADIENTS),
            (self.model[0], "zero_grad_buffer", GRADIENTS),
        ):
            setattr(owner, name, self._within(part, getattr(owner, name)))
        # What torch takes on a GPU; on a CPU it goes through the parameters one by one.
        for group in self.optimizer.param_groups:
            group["foreach"] = not group.get("fused")
        self._inner = unwrap_model(self.model[0])
        self.parts = watch_layers(self._inner, self._places)

    def step(self, batch: Mapping[str, Any]) -> tuple[Any, ...]:
        """One step, with its line in the log where one is due."""
        result = super().step(batch)
        losses, skipped, _, _, _, norm, zeros, _ = result
        rate = self.optimizer.param_groups[0]["lr"]
        training.training_log(
            losses, self._totals, rate, self.taken, 1.0, False, skipped, norm, None, zeros, 0
        )
        if skipped:
            raise RuntimeError("a step was not applied, so it is not one to count")
        return result

    def counted(self, batch: Mapping[str, Any]) -> Counts:
        """The same, counted. The weights stay: what fake ranks gather is no model."""
        weights = list(self._inner.parameters())
        before = [weight.detach().clone() for weight in weights]
        left_out = [*weights, *self._inner.buffers()]
        counts = count_step(lambda: self.step(batch), self._places, left_out)
        with torch.no_grad():
            torch._foreach_copy_(weights, before)
        return counts

    def _forward(self, *args: Any) -> Any:
        """The forward step and its loss; a micro-batch begins with what is ahead of the layers."""
        self._places.enter(EMBEDDING)
        output, loss = self._forward_and_loss(*args)
        self._places.leave()
        return output, self._within(HEAD, loss)

    def _within(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def labelled(*args: Any, **kwargs: Any) -> Any:
            with self._places.part(part):
                return function(*args, **kwargs)

        return labelled
