"""The LM head, which gives logits or, with labels, what a loss is made of."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_trinity.model.loss import token_losses


class LMHead(ColumnParallelLinear):
    """Megatron's linear layer over a split vocabulary, and the loss in the same call.

    The loss is computed within the module, not beside it, because what waits for weights (the
    hooks of `--overlap-param-gather`) runs when a module is called.
    """

    @classmethod
    def of(cls, linear: ColumnParallelLinear) -> LMHead:
        """The head with the weight of `linear`, in its place."""
        head = cls(
            linear.input_size,
            linear.output_size,
            config=linear.config,
            init_method=linear.config.init_method,
            bias=False,
            gather_output=linear.gather_output,
            skip_weight_param_allocation=True,
            tp_group=linear.tp_group,
        )
        head.weight = linear.weight
        return head

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        labels: Tensor | None = None,
        true_vocab_size: int | None = None,
    ) -> tuple[Tensor, None]:
        """Logits, as `ColumnParallelLinear` gives them, or the losses of tokens.

        Args:
            input_: `[s, b, h]` hidden states; `[s/tp, b, h]` under sequence parallelism.
            weight: in the place of the module's own.
            labels: `[b, s]` int64.
            true_vocab_size: rows that are not padding; by default all are.
        Returns: `[s, b, v/tp]`; or with labels `[4, b, s]` fp32, rows as in
            `megatron_trinity.model.loss.Row`, on every rank.
        """
        if labels is None:
            logits: Any = super().forward(input_, weight, runtime_gather_output)
            return logits[0], None
        gather = (
            gather_from_sequence_parallel_region
            if self.sequence_parallel
            else copy_to_tensor_model_parallel_region
        )
        losses = token_losses(
            gather(input_, group=self.tp_group),
            self.weight if weight is None else weight,
            labels.transpose(0, 1),
            self.output_size if true_vocab_size is None else true_vocab_size,
            self.tp_group,
            chunk_size=self.config.loss_chunk_size,
            into_main_grad=self.gradient_accumulation_fusion,
        )
        # Batch first, as Megatron's loss functions take it.
        return losses.transpose(1, 2).contiguous().float(), None
