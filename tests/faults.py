"""Values that are not finite, put into the steps of a real run where a test wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.broken_runs import Outcome, train


@dataclass(frozen=True)
class Fault:
    """Attributes:
    where: `attention` of layer 2 gives NaN; `gradient` of layer 3's router is infinite, with
        `spike` it is large; `loss` is infinite, with finite gradients, with `high` it is ten
        times what it was; `update` leaves NaN in a weight; `persistent` and `transient` are
        errors that Megatron's rerun machine is made to see.
    iterations: in which it happens.
    rank: of the world, on which it happens.
    """

    where: str
    iterations: tuple[int, ...]
    rank: int = 0


def train_with(
    rank: int, world_size: int, flags: Sequence[str], fault: Fault, steps: Path | None = None
) -> Outcome:
    """Train with a fault, and say how it ended."""
    with faulty_steps(fault):
        return train(rank, world_size, flags, steps)


@contextmanager
def faulty_steps(fault: Fault) -> Iterator[None]:
    import torch.distributed as dist
    from megatron.core.utils import unwrap_model
    from megatron.training import training

    original = training.train_step

    def step(*args: Any, **kwargs: Any) -> Any:
        present = kwargs["iteration"] + 1 in fault.iterations and dist.get_rank() == fault.rank
        with ExitStack() as stack:
            if present:
                stack.enter_context(FAULTS[fault.where](unwrap_model(args[2][0])))
            result = original(*args, **kwargs)
        if present and fault.where == "update":
            next(args[2][0].parameters()).data[0].fill_(torch.nan)
        return result

    training.train_step = step
    try:
        yield
    finally:
        training.train_step = original


@contextmanager
def _attention(model: Any) -> Iterator[None]:
    def broken(*call: Any) -> Any:
        output, bias = call[-1]
        return output * torch.nan, bias

    handle = model.decoder.layers[1].self_attention.register_forward_hook(broken)
    yield
    handle.remove()


@contextmanager
def _gradient(model: Any) -> Iterator[None]:
    router = model.decoder.layers[2].mlp.router.weight
    handle = router.register_hook(lambda gradient: gradient + torch.inf)
    yield
    handle.remove()


@contextmanager
def _spike(model: Any) -> Iterator[None]:
    weight = next(model.decoder.layers[-1].parameters())
    handle = weight.register_hook(lambda gradient: gradient + 1e6)
    yield
    handle.remove()


@contextmanager
def _loss(model: Any) -> Iterator[None]:
    def infinite(*call: Any) -> Tensor:
        added = torch.zeros_like(call[-1])
        added[0] = torch.inf  # a constant: gradients stay what they were
        return call[-1] + added

    handle = model.register_forward_hook(infinite)
    yield
    handle.remove()


@contextmanager
def _high(model: Any) -> Iterator[None]:
    def scaled(*call: Any) -> Tensor:
        # The value alone: what is behind it in the graph has gradients as before.
        return call[-1] + 9.0 * call[-1].detach()

    handle = model.register_forward_hook(scaled) if model.post_process else None
    yield
    if handle is not None:
        handle.remove()


@contextmanager
def _injected(kind: str, model: Any) -> Iterator[None]:
    from megatron.core.rerun_state_machine import (
        RerunDiagnostic,
        RerunErrorInjector,
        get_rerun_state_machine,
    )

    machine = get_rerun_state_machine()
    before, machine.error_injector = (
        machine.error_injector,
        RerunErrorInjector(error_injection_rate=1, error_injection_type=RerunDiagnostic(kind)),
    )
    yield
    machine.error_injector = before


FAULTS: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "attention": _attention,
    "gradient": _gradient,
    "spike": _spike,
    "loss": _loss,
    "high": _high,
    "update": nullcontext,  # done behind the step
    "persistent": partial(_injected, "persistent_error"),
    "transient": partial(_injected, "transient_error"),
}
