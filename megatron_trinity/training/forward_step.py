"""What Megatron's schedules call for each micro-batch: the forward pass, and the loss behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args
from torch import Tensor

from megatron_trinity.model import compiling
from megatron_trinity.model.loss import Row
from megatron_trinity.training.batch import next_batch
from megatron_trinity.training.flops import StepFlops
from megatron_trinity.training.micro_batches import MicroBatchRecord

Loss = tuple[Tensor, Tensor, dict[str, Tensor]]


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]] | None,
    model: Any,
    *_: Any,
    record: MicroBatchRecord | None = None,
    flops: StepFlops | None = None,
) -> tuple[Tensor, Callable[[Tensor], Loss]]:
    """Run one micro-batch through this rank's part of the model.

    Args:
        record: where training micro-batches are noted.
        flops: where the documents of training micro-batches are noted.
    Returns: the stage's output, and the function that makes a loss of it on the last stage. In
        evaluation the loss is the cross entropy, and nothing else is reported.
    """
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    batch = next_batch(data_iterator, vp_stage)
    documents = batch["documents"]
    # Each virtual stage sees the same documents.
    if flops is not None and documents is not None and torch.is_grad_enabled() and not vp_stage:
        flops.note(documents.lengths)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,  # attention mask: Trinity's core attention makes its own
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=documents,
    )
    mask = batch["loss_mask"]
    if not torch.is_grad_enabled():
        return output, partial(cross_entropy_loss, mask)
    return output, partial(masked_loss, mask, z_loss_coeff=current_z_loss_coeff(), record=record)


def current_z_loss_coeff() -> float:
    """The coefficient of the z-loss in the training step that is under way.

    Iterations count as in the log, from 1: Megatron's `curr_iteration`, which it sets before each
    step and after a resume as well, is the number of those that have ended.
    """
    args = get_args()
    started = args.curr_iteration + 1 >= args.z_loss_start_iteration
    coefficient: float = args.z_loss_coeff if started else 0.0
    return coefficient


def masked_loss(
    loss_mask: Tensor,
    output: Tensor,
    z_loss_coeff: float = 0.0,
    record: MicroBatchRecord | None = None,
) -> Loss:
    """Sum the training losses of the tokens that carry loss: cross entropy + c * logsumexp^2.

    The second term is the z-loss (the report's, in the form of Liger's `lse_square_scale`).

    Args:
        loss_mask: `[b, s]` fp32, 1 where a token carries loss.
        output: `[4, b, s]`, rows as in `megatron_trinity.model.loss.Row`.
        z_loss_coeff: c.
        record: where the micro-batch is noted.
    Returns: the sum, the number of tokens in it (int32), and for the log pairs (sum, number of
        tokens), which Megatron adds up over the global batch before it divides: `lm loss` (cross
        entropy alone) and, with c above 0, `z loss` (c * logsumexp^2).
    """
    mask = loss_mask.float()
    total = torch.sum(output[Row.CROSS_ENTROPY] * mask)
    noted = compiling.fitting(micro_batch_values, output)(output.detach(), mask)
    count = noted[1]
    report = {"lm loss": noted[:2]}
    if record is not None:
        record.append(noted)
    if z_loss_coeff > 0:
        z_loss = z_loss_coeff * torch.sum(output[Row.LOG_SUM_EXP].square() * mask)
        report["z loss"] = torch.stack([z_loss.detach(), count])
        total = total + z_loss
    result: Tensor = _Poisoned.apply(total)
    return result, count.to(torch.int32), report


def micro_batch_values(output: Tensor, mask: Tensor) -> Tensor:
    """What is noted of a micro-batch, see `MicroBatchRecord.append`."""
    largest = output[Row.LARGEST_LOGIT].masked_fill(mask == 0, -torch.inf)
    return torch.stack(
        [
            torch.sum(output[Row.CROSS_ENTROPY] * mask),
            mask.sum(),
            torch.sum(output[Row.MEAN_LOGIT] * mask),
            largest.max(),
        ]
    )


class _Poisoned(torch.autograd.Function):
    """The same value, whose gradients are NaN if it is not finite.

    An infinite loss may well have finite gradients, which would be applied. The norm of NaN
    gradients tells every rank, with no exchange or host sync of its own.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor) -> Tensor:
        ctx.save_for_backward(total)
        return total.clone()  # no view: pipeline schedules free what a stage gives out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (total,) = ctx.saved_tensors
        return torch.add(gradient, total, alpha=0)  # 0 times what is not finite is NaN


def cross_entropy_loss(loss_mask: Tensor, output: Tensor) -> Loss:
    """As `masked_loss`, of the cross entropy alone: evaluation's loss."""
    mask = loss_mask.float()
    total = torch.sum(output[Row.CROSS_ENTROPY] * mask)
    tokens = mask.sum().to(torch.int32)
    report = torch.stack([total.detach(), tokens.to(total.dtype)])
    return total, tokens, {"lm loss": report}
