"""The Trinity language model: megatron-core's GPTModel with a scaled embedding and its own loss."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor, nn

from megatron_trinity.model.loss import vocab_parallel_cross_entropy


class TrinityModel(GPTModel):
    """`GPTModel` whose token embeddings are multiplied by sqrt(hidden_size) (report, eq. 39).

    Given labels, it returns more of each token than the cross entropy: what z-loss and the log
    need. Other arguments are those of `GPTModel`, with a `TrinityConfig` as `config`.
    """

    def __init__(
        self, config: Any, *args: Any, true_vocab_size: int | None = None, **kwargs: Any
    ) -> None:
        """`true_vocab_size` leaves out the rows that pad the vocabulary; by default there are none.

        It is for the largest and the mean logit, see `vocab_parallel_cross_entropy`.
        """
        super().__init__(config, *args, **kwargs)
        self.true_vocab_size = self.vocab_size if true_vocab_size is None else true_vocab_size
        if self.pre_process and config.mup_enabled:
            # Megatron's `use_mup` would scale this too, but also the softmax, the init and the LR.
            self.embedding.word_embeddings.register_forward_hook(self._scale_embedding)

    def _scale_embedding(
        self, module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor
    ) -> Tensor:
        return out * float(self.config.hidden_size) ** 0.5

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """What a loss can be made of, for each token; in place of Megatron's cross entropy.

        Args:
            labels: `[b, s]` int64.
            logits: `[s, b, v/tp]`, this rank's part of the (padded) vocabulary. Used up if fp32.
        Returns: `[4, b, s]` fp32, rows as in `megatron_trinity.model.loss.Row`.
        """
        losses = vocab_parallel_cross_entropy(
            logits, labels.transpose(0, 1), self.true_vocab_size, self.pg_collection.tp
        )
        return losses.stacked().float()
