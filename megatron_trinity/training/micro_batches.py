"""What is worth knowing of single micro-batches: how much their losses differ, the largest logit.

Sums over the global batch are Megatron's to make. A maximum is not, so the loss function notes
here what it saw of each micro-batch, and the ranks put it together when the step has ended.
"""

from __future__ import annotations

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

    def append(self, values: Tensor) -> None:
        """Note one micro-batch, or this rank's part of its sequence.

        Args:
            values: `[4]` of the tokens with loss: summed lm loss in nats, their number, sum of the
                mean of each one's logits, largest logit; -inf if there are none.
        """
        self._rows.append(values)

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
        """`step_values` of `gathered`."""
        rows = self.gathered(groups)
        return {} if rows is None else step_values(rows.cpu())

    def gathered(self, groups: ProcessGroupCollection | None = None) -> Tensor | None:
        """The micro-batches of the whole global batch, on the device; clears the record.

        Collective over the data- and context-parallel ranks of the last pipeline stage. Ranks of
        other stages have no record: they wait for nobody and get None. What is made of a few
        numbers a micro-batch is made on the host: each step of it would be a launch of its own.

        Args:
            groups: with `cp` and `dp_cp`; by default those that Megatron has initialized.
        Returns: `[dp, cp, m, 4]` of m micro-batches of a rank, the last axis as in `append`, the
            largest logit last.
        """
        if not self._rows:
            return None
        rows = torch.stack(self._rows)
        self._rows.clear()
        if groups is None:
            groups = ProcessGroupCollection.use_mpu_process_groups(["cp", "dp_cp"])
        if groups.dp_cp.size() == 1:
            return rows[None, None]
        # Of the ranks of the group, those of one sequence are neighbours.
        everywhere = rows.new_empty(groups.dp_cp.size() * len(rows), rows.size(1))
        dist.all_gather_into_tensor(everywhere, rows, group=groups.dp_cp)
        return everywhere.view(-1, groups.cp.size(), *rows.shape)


def step_values(rows: Tensor) -> dict[str, float]:
    """The values of a step by their names in the log, from what `gathered` gives, on the host.

    `batch heterogeneity` is max_i L_i - mean_i L_i, where L_i is the mean lm loss of micro-batch i
    (report, eq. 40). Micro-batches without a token that carries loss are left out. `max logit` and
    `mean logit` are over all tokens with loss.

    Raises:
        TrinityError: no token of the global batch carried loss.
    """
    values = rows.double().numpy()
    of_sequences = values[..., :-1].sum(axis=1)
    sums, tokens, mean_logits = of_sequences[of_sequences[..., 1] > 0].T
    if not len(tokens):
        raise TrinityError(
            "no token of this step carries a loss, so there is nothing to learn from: is the "
            "training data made of documents of one token, or masked as a whole?"
        )
    losses = sums / tokens
    return {
        "batch heterogeneity": float(losses.max() - losses.mean()),
        "max logit": float(values[..., -1].max()),
        "mean logit": float(mean_logits.sum() / tokens.sum()),
    }
