"""The Trinity language model: megatron-core's GPTModel with a scaled embedding and its own loss."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor, nn

from megatron_trinity.errors import TrinityError
from megatron_trinity.model.head import LMHead

EXTRA_STATE = "_extra_state"
"""End of the name of an object that a linear layer keeps beside its weight; empty but in FP8."""


class TrinityModel(GPTModel):
    """`GPTModel` whose token embeddings are multiplied by sqrt(hidden_size) (report, eq. 39).

    Given labels, it returns more of each token than the cross entropy: what z-loss and the log
    need. Other arguments are those of `GPTModel`, with a `TrinityConfig` as `config`.
    """

    def __init__(
        self, config: Any, *args: Any, true_vocab_size: int | None = None, **kwargs: Any
    ) -> None:
        """`true_vocab_size` leaves out the rows that pad the vocabulary; by default there are none.

        It is for the loss, see `token_losses`.
        """
        super().__init__(config, *args, **kwargs)
        self.true_vocab_size = self.vocab_size if true_vocab_size is None else true_vocab_size
        if self.post_process:
            linear: ColumnParallelLinear = self.output_layer
            self.output_layer: LMHead = LMHead.of(linear)
        if self.pre_process and config.mup_enabled:
            # Megatron's `use_mup` would scale this too, but also the softmax, the init and the LR.
            self.embedding.word_embeddings.register_forward_hook(self._scale_embedding)

        self.register_load_state_dict_post_hook(_whole)

    def _scale_embedding(
        self, module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor
    ) -> Tensor:
        return out * float(self.config.hidden_size) ** 0.5

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The stage's output.

        Args:
            labels: `[b, s]` int64.
        Returns: of the last stage, with labels, what a loss can be made of for each token:
            `[4, b, s]` fp32, rows as in `megatron_trinity.model.loss.Row`. Without labels logits
            `[b, s, v/tp]`, this rank's part of the (padded) vocabulary. Of other stages hidden
            states `[s, b, h]`.
        """
        if labels is not None:
            kwargs["output_processor"] = self._losses
        output: Tensor = super().forward(
            input_ids, position_ids, attention_mask, decoder_input, labels, **kwargs
        )
        return output

    def _losses(
        self, *, hidden_states: Tensor, output_weight: Tensor | None, labels: Tensor, **_: Any
    ) -> Tensor:
        losses: Tensor = self.output_layer(
            hidden_states, output_weight, labels=labels, true_vocab_size=self.true_vocab_size
        )[0]
        return losses


def _whole(model: nn.Module, found: Any) -> None:
    """Refuse a state that lacks a tensor or has one too many, if it is not loaded strictly, too.

    Megatron loads a checkpoint again without `strict` when it does not fit, and goes on with the
    initial values of what is missing.

    Args:
        found: torch's lists of `missing_keys` and `unexpected_keys`.
    Raises:
        TrinityError: it is not whole.
    """
    for keys, told in ((found.missing_keys, "lacks"), (found.unexpected_keys, "has no place for")):
        keys[:] = [key for key in keys if not key.endswith(EXTRA_STATE)]
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            what = "the model's state" if told == "lacks" else "the model"
            raise TrinityError(f"{what} {told} {keys[0]}{more}")
