"""What Megatron's schedules call for each micro-batch: the forward pass, and the loss behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_trinity.training.batch import next_batch

Loss = tuple[Tensor, Tensor, dict[str, Tensor]]


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]] | None, model: Any, *_: Any
) -> tuple[Tensor, Callable[[Tensor], Loss]]:
    """Run one micro-batch through this rank's part of the model.

    Returns: the stage's output, and the function that makes a loss of it on the last stage.
    """
    batch = next_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,  # attention mask: Trinity's core attention makes its own
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(masked_loss, batch["loss_mask"])


def masked_loss(loss_mask: Tensor, token_losses: Tensor) -> Loss:
    """Sum the losses of the tokens that carry loss.

    Args:
        loss_mask: `[b, s]` fp32, 1 where a token carries loss.
        token_losses: `[b, s]` cross entropy of each token, nats.
    Returns: the sum, the number of tokens in it (int32), and `lm loss` for the log as (sum,
        number), which Megatron adds up over the global batch before it divides.
    """
    mask = loss_mask.reshape(-1).float()
    total = torch.sum(token_losses.reshape(-1).float() * mask)
    tokens = mask.sum().to(torch.int32)
    report = torch.stack([total.detach(), tokens.to(total.dtype)])
    return total, tokens, {"lm loss": report}
