"""A Trinity layer: Megatron's, whose router knows documents and padding of the tokens it gets."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_trinity.model.context_parallel import this_rank_part
from megatron_trinity.model.documents import Documents
from megatron_trinity.moe.router import TrinityRouter
from megatron_trinity.moe.sequence_loss import RoutedDocuments


class TrinityLayer(TransformerLayer):
    """Megatron's layer hands documents to attention alone; here the router has them, too.

    Padding goes the way that Megatron has for it, as an argument, which recompute keeps. There is
    none for documents: the router is told of them, for the sequence-wise loss.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As `TransformerLayer.forward`."""
        router = getattr(self.mlp, "router", None)
        documents = kwargs.get("packed_seq_params")
        if documents is not None and documents.padding is not None:
            kwargs["padding_mask"] = self._of_this_rank(documents.padding).T
        if not isinstance(router, TrinityRouter) or not self.config.seq_aux_loss_coeff:
            result: tuple[Tensor, Tensor | None] = super().forward(*args, **kwargs)
            return result
        self._tell(router, documents)
        output, context = super().forward(*args, **kwargs)
        if documents is not None and output.requires_grad:
            # A recompute inside this layer's backward routes again, when the router has long had
            # other micro-batches; the gradient of the output comes just ahead of it.
            output.register_hook(lambda _: self._tell(router, documents))
        return output, context

    def _tell(self, router: TrinityRouter, documents: Documents | None) -> None:
        if documents is None:
            router.documents = None
            return
        router.documents = RoutedDocuments(
            self._of_this_rank(documents.ids),
            documents.lengths,
            documents.counted,
            documents.shares,
        )

    def _of_this_rank(self, tokens: Tensor) -> Tensor:
        """`[b, s]` of whole sequences to this rank's part of them, `[s, b]`."""
        part = this_rank_part(tokens.T, self.pg_collection.cp)
        if self.config.sequence_parallel:
            tp = self.pg_collection.tp
            part = part.chunk(tp.size())[tp.rank()]
        return part
