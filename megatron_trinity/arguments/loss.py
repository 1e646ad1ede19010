"""The loss: its flags, and what it does not know."""

from __future__ import annotations

import argparse

from megatron_trinity.arguments.refusal import Refusal


def add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to `parser`."""
    group = parser.add_argument_group(title="trinity loss")
    group.add_argument(
        "--seq-aux-loss-coeff",
        type=float,
        default=0.0,
        metavar="ALPHA",
        help="sequence-wise auxiliary loss (default: %(default)s)",
    )
    group.add_argument(
        "--z-loss-coeff",
        type=float,
        default=0.0,
        help="weight of the mean squared logsumexp of the LM head (default: %(default)s)",
    )
    group.add_argument(
        "--z-loss-start-iteration",
        type=int,
        default=0,
        metavar="N",
        help="iteration, as in the log, from which the z-loss is on (default: %(default)s)",
    )
    group.add_argument(
        "--loss-chunk-size",
        type=int,
        metavar="N",
        help="tokens whose logits a rank holds at once, of a micro-batch; 0 for all "
        "(default: as many as have 2^27 logits)",
    )


LOSS_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "loss-fusion",
        lambda a: a.cross_entropy_loss_fusion,
        "{--cross-entropy-loss-fusion} would change nothing: Trinity's loss has its own pass "
        "over the logits; leave it out",
    ),
    Refusal(
        "loss-weights",
        lambda a: a.seq_aux_loss_coeff < 0 or a.z_loss_coeff < 0 or a.z_loss_start_iteration < 0,
        "{--seq-aux-loss-coeff}, {--z-loss-coeff} and {--z-loss-start-iteration} cannot be "
        "negative; use 0 to leave a loss out",
    ),
    Refusal(
        "loss-chunk",
        lambda a: a.loss_chunk_size is not None and a.loss_chunk_size < 0,
        "{--loss-chunk-size=}: use 1 token or more, or 0 for a whole micro-batch at once",
    ),
)
