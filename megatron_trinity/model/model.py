"""The Trinity language model: megatron-core's GPTModel with a scaled embedding."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor, nn


class TrinityModel(GPTModel):
    """`GPTModel` whose token embeddings are multiplied by sqrt(hidden_size) (report, eq. 39).

    Arguments are those of `GPTModel`, with a `TrinityConfig` as `config`.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if self.pre_process and config.mup_enabled:
            # Megatron's `use_mup` would scale this too, but also the softmax, the init and the LR.
            self.embedding.word_embeddings.register_forward_hook(self._scale_embedding)

    def _scale_embedding(
        self, module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor
    ) -> Tensor:
        return out * float(self.config.hidden_size) ** 0.5
