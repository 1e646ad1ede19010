"""What is worth knowing of single micro-batches: how much their losses differ, the largest logit.

Sums over the global batch are Megatron's to make. A maximum is not, so the loss function notes
here what it saw of each micro-batch, and the ranks put it together when the step has ended.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_trinity.errors import TrinityError


class MicroBatchRecord:
    """The micro-batches of one training step, on ranks that compute a loss.

    State of a step: it is saved nowhere. Values stay on the device.
    """

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def clear(self) -> None:
        """Forget the step that is under way."""
        self._rows.clear()

    def append(
        self, loss_sum: Tensor, tokens: Tensor, largest_logit: Tensor, mean_logits: Tensor
    ) -> None:
        """Note one micro-batch, or this rank's part of its sequence.

        Args:
            loss_sum: summed lm loss of the tokens with loss, nats.
            tokens: their number.
            largest_logit: over these tokens; -inf if there are none.
            mean_logits: sum over these tokens of the mean of each one's logits.
        """
        values = (loss_sum, tokens, mean_logits, largest_logit)
        self._rows.append(torch.stack([value.detach() for value in values]))

    def loss(self) -> Tensor:
        """The mean lm loss of the step's tokens so far, on every rank of the world, the same.

        Collective over all of them; nothing is cleared. A loss stands on each of the
        tensor-parallel ranks of the last stage, in its sum and in the number of its tokens.

        Returns: `[]` fp64, on the device.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
        for row in self._rows:
            sums += row[:2]
        dist.all_reduce(sums)
        return sums[0] / sums[1]

    def reduce(self, groups: ProcessGroupCollection | None = None) -> dict[str, float]:
        """`step_values` of `totals`."""
        totals = self.totals(groups)
        return {} if totals is None else step_values(totals.tolist())

    def totals(self, groups: ProcessGroupCollection | None = None) -> Tensor | None:
        """What `step_values` needs of the whole global batch, on the device; clears the record.

        Collective over the data- and context-parallel ranks of the last pipeline stage. Ranks of
        other stages have no record: they wait for nobody and get None.

        Args:
            groups: with `cp`, `dp` and `dp_cp`; by default those that Megatron has initialized.
        Returns: `[6]` fp64.
        """
        if not self._rows:
            return None
        rows = torch.stack(self._rows).double()
        self._rows.clear()
        if groups is None:
            groups = ProcessGroupCollection.use_mpu_process_groups(["cp", "dp", "dp_cp"])

        if groups.cp.size() > 1:
            of_sequence = rows[:, :-1].contiguous()
            _all_reduce(of_sequence, dist.ReduceOp.SUM, groups.cp)
            rows = torch.cat([of_sequence, rows[:, -1:]], dim=1)
        sums, tokens, mean_logits, largest = rows.unbind(1)
        # Those without a token are masked: picking the others would have to know their number.
        without = tokens == 0
        losses = sums / tokens

        highest = losses.masked_fill(without, -torch.inf)
        maxima = torch.stack([highest, largest]).amax(1)
        _all_reduce(maxima, dist.ReduceOp.MAX, groups.dp_cp)
        counted = torch.stack([losses, torch.ones_like(tokens), mean_logits, tokens])
        totals = counted.masked_fill(without, 0.0).sum(1)
        _all_reduce(totals, dist.ReduceOp.SUM, groups.dp)
        return torch.cat([maxima, totals])


def step_values(totals: Sequence[float]) -> dict[str, float]:
    """The values of a step by their names in the log, from the numbers of `totals`.

    `batch heterogeneity` is max_i L_i - mean_i L_i, where L_i is the mean lm loss of micro-batch i
    (report, eq. 40). Micro-batches without a token that carries loss are left out. `max logit` and
    `mean logit` are over all tokens with loss.

    Raises:
        TrinityError: no token of the global batch carried loss.
    """
    highest, max_logit, loss_sum, batches, logits, count = totals
    if not batches:
        raise TrinityError(
            "no token of this step carries a loss, so there is nothing to learn from: is the "
            "training data made of documents of one token, or masked as a whole?"
        )
    return {
        "batch heterogeneity": highest - loss_sum / batches,
        "max logit": max_logit,
        "mean logit": logits / count,
    }


def _all_reduce(
    values: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup
) -> None:
    if group.size() > 1:
        dist.all_reduce(values, operation, group)
