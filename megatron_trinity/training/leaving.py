"""All ranks leave behind one step, whichever of them was told to stop.

What each was told travels with the counts of the experts, which every rank sums and reads behind
each step: one more number in an exchange that is made anyway, and no wait of the host for it.
Evaluation and saves, which may take longer than a step, have an exchange of their own.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.training.utils import print_rank_0
from torch import Tensor

from megatron_trinity.errors import Stopped
from megatron_trinity.reporting.events import alarm
from megatron_trinity.training.stop import DURATION, Reason, Stop


class Leaving:
    """Whether the run leaves, the same on every rank.

    Attributes:
        agreed: why it leaves; None as long as it goes on.
    """

    def __init__(self, args: Namespace, stop: Stop) -> None:
        self._args, self._stop = args, stop
        self.agreed: Reason | None = None
        self._begun = False

    def told(self) -> Tensor:
        """How many ranks were told what, to be summed over all of them.

        Returns: `[number of reasons]` int64; of this rank alone.
        """
        reasons, pending = self._stop.reasons, self._stop.pending
        flags = torch.zeros(len(reasons), dtype=torch.int64, device=torch.cuda.current_device())
        late = self._stop.has_begun and self._is_late()  # a start that was long has a step, too
        for place, reason in enumerate(reasons):
            if reason in pending or (reason == DURATION and late):
                flags[place] += 1  # a kernel, not a copy that the host would wait for
        return flags

    def heard(self, sums: Iterable[float]) -> None:
        """Take what all ranks were told."""
        told = zip(self._stop.reasons, sums, strict=True)
        self.agreed = self.agreed or next((reason for reason, number in told if number), None)

    def ask(self) -> bool:
        """Whether the run leaves, as of now. Collective, and the host waits."""
        if self.agreed is None:
            flags = self.told()
            dist.all_reduce(flags)
            self.heard(flags.tolist())
        return self.agreed is not None

    def leaves(self, iteration: int, saved: bool, save: Callable[[], None]) -> bool:
        """Behind a step and what was due with it: save, and say whether the run leaves.

        Args:
            saved: whether this iteration was.
            save: saves it.
        """
        if self.agreed is None and not (saved and self.ask()):
            return False
        assert self.agreed is not None
        if self._args.save and not saved:
            save()
        what = "saved" if self._args.save else "nothing is saved, without --save"
        line = f"stopped by {self.agreed.words} behind iteration {iteration}: {what}"
        print_rank_0(line)
        alarm("signal", line, iteration)
        return True

    @contextmanager
    def with_its_code(self) -> Iterator[None]:
        """Have the end of Megatron's loop be what it is for.

        Raises:
            Stopped: in the place of an exit with code 0.
        """
        try:
            yield
        except SystemExit as done:
            if self.agreed is None or done.code:
                raise
            raise Stopped("", self.agreed.code) from None

    def step_begins(self) -> None:
        """From the first step on there is something to save.

        Raises:
            Stopped: a rank was told to stop before it.
        """
        if not self._begun:
            self._begun = True
            self._stop.training_begins(lambda: self.agreed if self.ask() else None)

    def _is_late(self) -> bool:
        from megatron.training import training

        minutes = self._args.exit_duration_in_mins
        return bool(minutes) and time.time() - training._TRAIN_START_TIME > 60 * minutes
