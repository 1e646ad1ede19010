"""How often a step makes the host wait for the device, behind its forward and backward pass."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from unittest.mock import Mock

import torch
from torch import Tensor

from megatron_trinity.planning.costs.host_syncs import HostSyncs
from megatron_trinity.planning.costs.operations import OperationCounter
from megatron_trinity.planning.costs.places import Places
from tests.distributed.pool import RankPools
from tests.optimizer import build_optimizer, canonical_shapes, random_tensors, set_gradients
from tests.trinity import afmoe_config, build, parse

FLAGS = ("--seq-aux-loss-coeff", "0.01", "--load-balancing", "smebu", "--z-loss-coeff", "1e-4")


def waits(step: Any) -> dict[str, int]:
    """Function and place to how many times the host waits in `step`."""
    syncs = HostSyncs(Places("step"))
    with OperationCounter(Places("step")), syncs:
        step()
    return {f"{s.what} in {s.where.split(':')[0]}": number for s, number in syncs.found.items()}


def behind_a_step(rank: int, world_size: int) -> tuple[list[dict[str, int]], dict[str, float]]:
    """Two steps of a real observer, the second with a line in its log."""
    from megatron.core.num_microbatches_calculator import (
        destroy_num_microbatches_calculator,
        init_num_microbatches_calculator,
    )

    from megatron_trinity.training import observer
    from megatron_trinity.training.balance import routers
    from megatron_trinity.training.flops import StepFlops
    from megatron_trinity.training.micro_batches import MicroBatchRecord
    from megatron_trinity.upstream.training_hooks import StepOutcome

    args = parse(afmoe_config(), FLAGS)
    args.curr_iteration, args.log_interval = 0, 2
    model = build(args)
    record = MicroBatchRecord()
    init_num_microbatches_calculator(0, None, 4, 2, 1)
    written: dict[str, float] = {}
    watching = observer.StepObserver(args, record, StepFlops(args))
    watching._write = written.update  # type: ignore[method-assign,assignment]
    watching._plan = Mock()  # it looks at Megatron's buffers, once, and reads nothing of the device
    optimizer = Namespace(param_groups=[{"kind": "adamw", "lr": 1e-3, "default_config": False}])
    found = []
    try:
        for _ in range(2):
            for router in routers([model]):
                router.routing(torch.randn(8, 2, 8))
            for losses in ((3.0, 4), (5.0, 0)):
                record.append(torch.tensor([*losses, -1.0, 2.0]))
            outcome = StepOutcome(True, 1.0, {"lm loss": torch.tensor(0.75)})
            found.append(waits(partial(watching.step_ended, [model], optimizer, outcome)))
            args.curr_iteration += 1
    finally:
        destroy_num_microbatches_calculator()
    return found, {**written, **watching._losses, **watching._sequence_loss}


def test_the_host_waits_once_for_all_that_is_logged(ranks: RankPools) -> None:
    [(found, values)] = ranks.run(behind_a_step, world_size=1)
    assert found == [{"cpu in megatron_trinity/training/host.py": 1}] * 2
    assert values["lm loss"] == 0.75
    assert values["batch heterogeneity"] == 0.0
    assert values["mean logit"] == -0.25
    unused = [values[f"unused experts/layer {number:02d}"] for number in range(2, 6)]
    assert values["unused experts"] == sum(unused)
    assert 0 < values["sequence loss"] < 1


def adding_up(rank: int, world_size: int) -> tuple[dict[str, int], list[float]]:
    """What Megatron's log does with values, in a log that adds them up as it does."""
    from megatron.core.timers import Timer

    from megatron_trinity.upstream import training_hooks

    totals: dict[str, Any] = {}

    def log(losses: dict[str, Tensor], total: dict[str, Tensor], iteration: int) -> None:
        for name, value in losses.items():
            zero = torch.tensor([0.0], device=torch.cuda.current_device())
            total[name] = total.get(name, zero) + value
        if iteration == 2:
            timer.elapsed(barrier=True)
            averages.extend(total[name].item() / 2 for name in total)

    timer = Timer("interval-time")
    timer.start()
    averages: list[float] = []
    hooks = Namespace(values=lambda: {"lm loss": 0.1, "speed": 3.0}, log_written=lambda _: None)
    before = training_hooks._hooks
    training_hooks.set_training_hooks(hooks)
    try:
        logged = training_hooks._with_values(log)

        def steps() -> None:
            for iteration in (1, 2):
                logged({"lm loss": torch.ones((), device=torch.device("cpu"))}, totals, iteration)

        return waits(steps), averages
    finally:
        training_hooks.set_training_hooks(before)


def test_values_that_were_read_are_added_up_on_the_host(ranks: RankPools) -> None:
    [(found, averages)] = ranks.run(adding_up, world_size=1)
    assert found == {}
    assert averages == [float(torch.tensor(0.1)), 3.0]


def norm_of_muon(
    rank: int, world_size: int, shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, int], float, float]:
    model, optimizer = build_optimizer((), random_tensors(shapes, seed=1))
    gradients = random_tensors(shapes, seed=2)
    set_gradients(model, gradients)
    norms: list[float] = []
    found = waits(lambda: norms.append(optimizer.get_grad_norm()))
    squares = sum(float(g.double().square().sum()) for g in gradients.values())
    return found, norms[0], squares**0.5


def test_the_norm_of_all_gradients_is_read_once(ranks: RankPools) -> None:
    [shapes] = ranks.run(canonical_shapes, world_size=1)
    [(found, norm, expected)] = ranks.run(norm_of_muon, shapes, world_size=1)
    assert found == {"tolist in megatron_trinity/optimizer/optimizer.py": 1}
    assert abs(norm / expected - 1) < 1e-5
