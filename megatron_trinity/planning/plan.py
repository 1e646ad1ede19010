"""A layout of a run, worked out: memory of each stage, traffic, time."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from megatron_trinity.planning.activations import Activations
from megatron_trinity.planning.estimate import Estimate, estimate
from megatron_trinity.planning.gpu_arguments import parse_for_gpus
from megatron_trinity.planning.kernels import Kernels, on_gpu
from megatron_trinity.planning.machines import Assumptions, Machine
from megatron_trinity.planning.memory import StageMemory, stage_memories
from megatron_trinity.planning.stages import stage_chunks
from megatron_trinity.planning.state import StageState
from megatron_trinity.planning.wire import Traffic, stage_traffic


@dataclass(frozen=True)
class Goal:
    """What is planned.

    Attributes:
        flags: of the trainer, that are given.
        node: GPUs of a node.
    """

    preset: str
    gpus: int
    machine: Machine
    node: int
    flags: tuple[str, ...] = ()
    assumed: Assumptions = field(default_factory=Assumptions)

    @property
    def room(self) -> float:
        """Bytes of a GPU that a run has."""
        return self.machine.memory - self.assumed.reserved


@dataclass(frozen=True)
class Plan:
    """A layout that the trainer takes.

    Attributes:
        flags: its words beside `--preset`, those that were given and those that were chosen.
    """

    goal: Goal
    flags: tuple[str, ...]
    args: Namespace
    kernels: Kernels
    memory: tuple[StageMemory, ...]
    is_exact: bool

    @cached_property
    def time(self) -> Estimate:
        goal = self.goal
        return estimate(
            self.args, self.kernels, goal.machine, goal.node, goal.assumed, self.is_exact
        )

    @property
    def fullest(self) -> StageMemory:
        return max(self.memory, key=lambda stage: stage.peak)

    @property
    def fits(self) -> bool:
        return self.fullest.peak <= self.goal.room

    def traffic(self) -> list[Traffic]:
        """Of a rank of the fullest stage."""
        stage, chunks = self.fullest.stage, stage_chunks(self.args)[self.fullest.stage]
        state = StageState(self.args, stage, chunks)
        return stage_traffic(Activations(self.args, self.kernels), stage, chunks, state)


def make_plan(goal: Goal, flags: Sequence[str]) -> Plan:
    """Work out the layout of `flags`, all that there are beside `--preset`.

    Raises:
        UsageError: the trainer would refuse them.
    """
    return plan_of(goal, flags, parse_for_gpus(goal.preset, goal.gpus, flags), exact=True)


def plan_of(goal: Goal, flags: Sequence[str], args: Namespace, exact: bool) -> Plan:
    """Of parsed arguments; not `exact` to compare layouts quickly."""
    kernels = on_gpu(args)
    memory = stage_memories(args, kernels, exact)
    return Plan(goal, tuple(flags), args, kernels, tuple(memory), exact)
