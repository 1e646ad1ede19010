"""Which rank keeps the others waiting: each one's own time of a step, side by side."""

from __future__ import annotations

import platform
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, median_low

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_trinity.training.own_time import PARTS, OwnTime

MEASURED = 5
"""Steps that are measured, the last ones of each interval; of their times a rank has the median."""


@dataclass(frozen=True)
class RankTimes:
    """What the ranks have needed for a step, each by itself.

    Attributes:
        iteration: the last one that was measured.
        seconds: `[ranks, parts]`, the parts as in `PARTS`.
        stages: each rank's pipeline stage. Stages have different work, so that a rank is compared
            with those of its own.
        hosts: each rank's machine.
    """

    iteration: int
    seconds: Sequence[Sequence[float]]
    stages: Sequence[int]
    hosts: Sequence[str]

    @property
    def own(self) -> list[float]:
        """Seconds of a step, by rank."""
        return [forward_backward + optimizer for forward_backward, optimizer, _ in self.seconds]

    @property
    def ratios(self) -> list[float]:
        """Each rank's seconds to the median of its stage; of two ranks that is the faster one."""
        return self._to_median(self.own)

    @property
    def slowest(self) -> int:
        """The rank with the largest ratio."""
        ratios = self.ratios
        return ratios.index(max(ratios))

    def parts(self, rank: int) -> dict[str, float]:
        """A rank's time of each part, to the median of its stage."""
        by_part = zip(PARTS, zip(*self.seconds, strict=True), strict=True)
        return {part: self._to_median(seconds)[rank] for part, seconds in by_part}

    def _to_median(self, seconds: Sequence[float]) -> list[float]:
        by_stage: dict[int, list[float]] = {}
        for stage, value in zip(self.stages, seconds, strict=True):
            by_stage.setdefault(stage, []).append(value)
        medians = {stage: median_low(values) for stage, values in by_stage.items()}
        pairs = zip(self.stages, seconds, strict=True)
        # A part that no rank of a stage has, such as data, is no slower on one of them.
        return [value / medians[stage] if medians[stage] else 1.0 for stage, value in pairs]


class SlowRanks:
    """Has this rank's steps measured, and hears of those of the others once an interval.

    Args:
        args: `straggler_interval`, 0 for never.
    """

    def __init__(self, args: Namespace, own: OwnTime | None = None) -> None:
        self._interval = args.straggler_interval
        self._steps: list[list[float]] = []
        self._known: list[tuple[int, str]] = []  # stage and host of each rank
        self.own = own or OwnTime()

    def step_begins(self, iteration: int) -> None:
        """Before each step; measures it if it is one of the last of an interval."""
        if self._interval and -iteration % self._interval < MEASURED:
            self.own.begins()

    def step_read(self, iteration: int) -> RankTimes | None:
        """When values of a step have been read; the times of all ranks where they are due.

        Collective where they are: one gather of three numbers a rank, for which the host waits.
        """
        if (seconds := self.own.read()) is not None:
            self._steps.append(seconds)
        self.own.forget()
        if not self._interval or iteration % self._interval:
            return None
        steps, self._steps = self._steps, []
        return self._gathered(iteration, steps)

    def _gathered(self, iteration: int, steps: Sequence[Sequence[float]]) -> RankTimes:
        device = torch.cuda.current_device()
        # A rank of which all steps were left out; then so they were on all of them.
        typical = [median(part) for part in zip(*steps, strict=True)] or [0.0] * len(PARTS)
        own = torch.tensor(typical, dtype=torch.float64, device=device)
        everyone = torch.empty(dist.get_world_size(), len(PARTS), dtype=own.dtype, device=device)
        dist.all_gather(list(everyone.unbind()), own)
        if not self._known:
            known: list[tuple[int, str]] = [(0, "")] * dist.get_world_size()
            stage = parallel_state.get_pipeline_model_parallel_rank()
            dist.all_gather_object(known, (stage, platform.node()))
            self._known = known
        stages, hosts = zip(*self._known, strict=True)
        return RankTimes(iteration, everyone.tolist(), stages, hosts)


def ranks_line(times: RankTimes) -> str:
    """One line that names the slowest rank."""
    rank = times.slowest
    fields = {
        "slowest": f"rank {rank} on {times.hosts[rank]}",
        "its own time (ms)": f"{1e3 * times.own[rank]:.1f}",
        "to the median": f"{times.ratios[rank]:.2f}",
        **{name: f"{ratio:.2f}" for name, ratio in times.parts(rank).items()},
    }
    joined = " | ".join(f"{name}: {value}" for name, value in fields.items())
    return f" ranks     {times.iteration:8d} | {joined} |"


def scalars(times: RankTimes) -> dict[str, float]:
    """What is worth a curve."""
    return {
        "slowest rank": float(times.slowest),
        "slowest rank, time to the median": max(times.ratios),
        "own time of a step, median (ms)": 1e3 * median(times.own),
    }


def event(times: RankTimes) -> dict[str, object]:
    """The same for a machine, with the seconds of every rank."""
    rank = times.slowest
    return {
        "kind": "ranks",
        "iteration": times.iteration,
        "slowest": rank,
        "host": times.hosts[rank],
        "ratio": times.ratios[rank],
        "parts": times.parts(rank),
        "seconds": times.own,
    }
