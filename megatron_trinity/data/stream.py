"""The samples of a run, from the first to the last: phase by phase, each with its blend."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from megatron_trinity.data.blend import Blend, Counts
from megatron_trinity.errors import TrinityError


@dataclass(frozen=True)
class Phase:
    """A stretch of the run.

    Attributes:
        samples: how many; None for the last phase, which goes on for as long as the run does.
        weights: number of a source to its weight, above 0.
    """

    samples: int | None
    weights: Mapping[int, float]


class Stream:
    """Sample of the run to (source, sample of the source).

    A pure function of the phases and the seed. A source goes on in a phase where the phases before
    have left it.
    """

    def __init__(self, phases: Sequence[Phase], sources: int, seed: int) -> None:
        """`sources`: how many there are; a phase need not have them all."""
        self._sources = sources
        self._members = [np.array(list(phase.weights), dtype=np.int64) for phase in phases]
        self._blends = [
            Blend(list(phase.weights.values()), phase.samples, seed, number)
            for number, phase in enumerate(phases)
        ]
        self._begins = [0, *accumulate(phase.samples or 0 for phase in phases[:-1])]
        self.end = None
        if (last := phases[-1].samples) is not None:
            self.end = self._begins[-1] + last
        self._before: list[Counts] = [np.zeros(sources, dtype=np.int64)]
        for number, begin in enumerate(self._begins[1:]):
            self._before.append(self._with(number, begin - self._begins[number]))

    def __getitem__(self, sample: int) -> tuple[int, int]:
        """Source of `sample`, and its number among all samples of that source."""
        phase = self.phase_of(sample)
        if self.end is not None and sample >= self.end:
            raise TrinityError(
                f"the data ends with sample {self.end}, and the run asks for more; give it a "
                "further phase"
            )
        member, index = self._blends[phase][sample - self._begins[phase]]
        source = int(self._members[phase][member])
        return source, int(self._before[phase][source]) + index

    def given(self, samples: int) -> Counts:
        """How many samples each source gives among the first `samples`, `[sources]`."""
        phase = self.phase_of(samples)
        return self._with(phase, samples - self._begins[phase])

    def phase_of(self, sample: int) -> int:
        """Number of the phase that `sample` is in, from 0."""
        return bisect_right(self._begins, sample) - 1

    def _with(self, phase: int, samples: int) -> Counts:
        """What all sources have given when `phase` has given `samples`."""
        counts = self._before[phase].copy()
        counts[self._members[phase]] += self._blends[phase].given(samples)
        return counts
