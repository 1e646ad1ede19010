"""How the expert bias follows the load: the sign rule and SMEBU (report, section 2.3).

Of one layer or of several at once. E experts, `...` layers or nothing; `counts` `[..., E]` int64 is
how many tokens of one optimizer step's whole global batch went to each expert. All arithmetic
starts from exact integers, so that ranks which agree on the counts agree on the bias bit by bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIGN_DEFAULT = 1e-3
"""gamma of the published configurations."""

SMEBU_DEFAULTS = (2.0, 5e-4, 0.5)
"""kappa, lambda, beta of the report."""

RULES = ("smebu", "sign", "none")
"""What `--load-balancing` takes; `none` leaves the bias as it is."""


def sign_update(bias: Tensor, counts: Tensor, gamma: float) -> Tensor:
    """Move each bias by `gamma` towards the mean load, then re-centre (report, eq. 19-22).

    Args:
        bias: `[..., E]` fp32.
        counts: `[..., E]` int64.
        gamma: step, above 0.
    Returns: the new bias, `[..., E]` fp32, of mean zero.
    """
    moved = bias.add(torch.sign(_shortfall(counts)), alpha=gamma)
    return moved - moved.mean(-1, keepdim=True)


def smebu_update(
    bias: Tensor, momentum: Tensor, counts: Tensor, kappa: float, lambda_: float, beta: float
) -> tuple[Tensor, Tensor]:
    """Soft-clamped momentum expert bias update (report, eq. 23-28).

    v = (mean - n) / mean, D = lambda tanh(kappa v) less its mean over experts,
    m = beta m + (1 - beta) D, b = b + m.

    Args:
        bias, momentum: `[..., E]` fp32.
        counts: `[..., E]` int64.
        kappa: steepness of the clamp.
        lambda_: largest step.
        beta: decay of the momentum, in [0, 1).
    Returns: the new bias and the new momentum, `[..., E]` fp32.
    """
    step = lambda_ * torch.tanh(kappa * violation(counts))
    step = (step - step.mean(-1, keepdim=True)).to(momentum.dtype)
    momentum = beta * momentum + (1 - beta) * step
    return bias + momentum, momentum


def violation(counts: Tensor) -> Tensor:
    """(mean - n) / mean of each expert, `[..., E]` fp64; zero in a layer without tokens."""
    return _shortfall(counts).double() / counts.sum(-1, keepdim=True).clamp(min=1)


def _shortfall(counts: Tensor) -> Tensor:
    """E times (mean - n), an exact integer; its sign is that of mean - n."""
    return torch.sub(counts.sum(-1, keepdim=True), counts, alpha=counts.size(-1))
