"""The layouts that fit, best first; and where none does, the least change with which one would."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_trinity.errors import UsageError
from megatron_trinity.planning.candidates import EP, PP, TP, Candidate, candidates
from megatron_trinity.planning.gpu_arguments import parse_for_gpus
from megatron_trinity.planning.machines import machines
from megatron_trinity.planning.plan import Goal, Plan, make_plan, plan_of

SHOWN = 5


@dataclass(frozen=True)
class Found:
    """Attributes:
    plans: that fit, best first; empty where none does.
    closest: the layout with the smallest peak, where none fits.
    ways: what would make one fit, the least change first.
    tried: layouts that were compared.
    """

    plans: list[Plan]
    closest: Plan | None
    ways: list[str]
    tried: int


def search(goal: Goal, shown: int = SHOWN) -> Found:
    """Raises: UsageError: the trainer would refuse the given flags in any layout."""
    rough = list(compared(goal))
    if not rough:
        raise UsageError(
            f"no layout divides {goal.gpus} GPUs with the given flags; leave some out, or change "
            "the number of GPUs or the global batch size"
        )
    fitting = sorted((p for p in rough if p.fits), key=lambda plan: plan.time.step)
    plans = list(_checked(goal, fitting, shown))
    if plans:
        return Found(sorted(plans, key=lambda p: p.time.step), None, [], len(rough))
    by_peak = sorted(rough, key=lambda plan: plan.fullest.peak)
    closest = next(_checked(goal, by_peak, 1, fits=False), None)
    return Found([], closest, list(_ways(goal, closest)) if closest else [], len(rough))


def compared(goal: Goal) -> Iterator[Plan]:
    """Every candidate, without the padding of buffers; where less is recomputed and fits, none
    that recomputes more."""
    base = base_arguments(goal)
    fits: set[Candidate] = set()
    for candidate in candidates(base, goal.flags, goal.node):
        layout = replace(candidate, recompute=None)
        if layout in fits:
            continue
        args = candidate.set_in(base)
        flags = (*goal.flags, *candidate.words(base, goal.flags))
        plan = plan_of(goal, flags, args, exact=False)
        if plan.fits:
            fits.add(layout)
        yield plan


def base_arguments(goal: Goal) -> Namespace:
    """The given flags in some layout that the trainer takes.

    Raises: UsageError: it takes none; as of the first.
    """
    first: UsageError | None = None
    for words in ((), (PP, "2"), (PP, "4"), (EP, "8"), (TP, "2", "--sequence-parallel")):
        try:
            return parse_for_gpus(goal.preset, goal.gpus, (*goal.flags, *words))
        except UsageError as error:
            first = first or error
    assert first is not None
    raise first


def _checked(goal: Goal, rough: list[Plan], number: int, fits: bool = True) -> Iterator[Plan]:
    """The first so many that the trainer's own check takes, worked out exactly."""
    left = number
    for plan in rough:
        if not left:
            return
        try:
            exact = make_plan(goal, plan.flags)
        except UsageError:
            continue
        if exact.fits or not fits:
            left -= 1
            yield exact


def _ways(goal: Goal, closest: Plan) -> Iterator[str]:
    """Single changes with which a layout fits, the least first."""
    changes: list[tuple[str, Goal]] = []
    if not closest.args.grad_reduce_in_bf16:
        flags = (*goal.flags, "--grad-reduce-in-bf16")
        changes.append(("--grad-reduce-in-bf16", replace(goal, flags=flags)))
    if closest.args.micro_batch_size > 1:
        flags = (*goal.flags, "--micro-batch-size", "1")
        changes.append(("--micro-batch-size 1", replace(goal, flags=flags)))
    for factor in (2, 4, 8):
        more = replace(goal, gpus=factor * goal.gpus)
        changes.append((f"--gpus {more.gpus}", more))
    for name, other in machines().items():
        if other.memory > goal.machine.memory:
            changes.append((f"--gpu {name}", replace(goal, machine=other)))
    half = closest.args.seq_length // 2
    flags = (*goal.flags, "--seq-length", str(half))
    changes.append((f"--sequence-length {half}", replace(goal, flags=flags)))
    for told, changed in changes:
        try:
            rough = [plan for plan in compared(changed) if plan.fits]
        except UsageError:
            continue
        if rough:
            yield f"{told}: {min(plan.fullest.peak for plan in rough) / 1e9:.1f} GB at least"
