"""What happens to a chunk's logits between the products of the head, compiled.

They are read in the dtype that the product gave them, and computed with in fp32. As Megatron's
fusions are, it is compiled where there is a GPU with Triton; the plain form is `loss.py`'s.

Shapes: n tokens, v logits of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_trinity.model import compiling


def is_fused(hidden: Tensor) -> bool:
    """Whether logits of such hidden states are taken here."""
    return hidden.dtype in (torch.bfloat16, torch.float16) and compiling.compiles(hidden)


def fused_statistics(
    logits: Tensor, target: Tensor, first: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `loss.statistics`, but the first result are the logits as they came."""
    return logits, compiling.compiled(logit_statistics)(logits, target, first)


def fused_gradient(
    logits: Tensor, shift: Tensor, factors: Tensor, both: Tensor, target: Tensor, first: int
) -> Tensor:
    """As `loss.gradient` of `loss.exponentials`, in the dtype of the logits."""
    result: Tensor = compiling.compiled(logit_gradient)(logits, shift, factors, both, target, first)
    return result


def within(logits: Tensor, target: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """`[n]`: a column of `logits`, the target's if it has one, and whether it has none."""
    column = target - first
    here = column.clamp(0, logits.size(-1) - 1)
    return here, here != column


def logit_statistics(logits: Tensor, target: Tensor, first: int) -> Tensor:
    """`[4, n]` fp32."""
    x = logits.float()
    largest = x.amax(-1)
    exp_sum = (x - largest.unsqueeze(-1)).exp().sum(-1)
    here, elsewhere = within(logits, target, first)
    of_target = logits.gather(-1, here.unsqueeze(-1)).squeeze(-1).float()
    of_target = of_target.masked_fill(elsewhere, 0.0)
    return torch.stack([largest, exp_sum, of_target, x.sum(-1)])


def logit_gradient(
    logits: Tensor, shift: Tensor, factors: Tensor, both: Tensor, target: Tensor, first: int
) -> Tensor:
    """`[n, v]`, see `loss.gradient`."""
    of_cross_entropy, of_log_sum_exp = both
    weight = (of_cross_entropy + of_log_sum_exp) * factors
    x = (logits.float() - shift.unsqueeze(-1)).exp() * weight.unsqueeze(-1)
    column = torch.arange(logits.size(-1), device=logits.device)
    at_target = column == (target - first).unsqueeze(-1)
    return (x - torch.where(at_target, of_cross_entropy.unsqueeze(-1), 0.0)).to(logits.dtype)
